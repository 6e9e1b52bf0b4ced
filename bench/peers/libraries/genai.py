"""OpenVINO GenAI, on the files that optimum-intel exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openvino_genai
from latents import openvino_unets
from PIL import Image


def prepare(model: Path, folder: Path, size: int, options: dict[str, str]) -> None:
    """Nothing: its files are optimum-intel's."""
    if not (folder / "model_index.json").exists():
        raise FileNotFoundError(f"{folder} was not exported")


class Pipeline:
    def __init__(self, folder: Path, size: int, options: dict[str, str]) -> None:
        pipe = openvino_genai.Text2ImagePipeline(folder)
        pipe.reshape(1, size, size, pipe.get_generation_config().guidance_scale)
        pipe.compile("CPU")
        self._pipe, self._size = pipe, size

    def __call__(self, prompt: str, steps: int, seed: int) -> Image.Image:
        made = self._pipe.generate(
            prompt, num_inference_steps=steps, rng_seed=seed, width=self._size, height=self._size
        )
        return Image.fromarray(made.data[0])


def unets(folder: Path, size: int, options: dict[str, str], count: int) -> Any:
    """UNets of ``count`` tasks: the same files and runtime as optimum-intel's."""
    return openvino_unets(folder, size, count)
