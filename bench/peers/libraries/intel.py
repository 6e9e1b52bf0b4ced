"""optimum-intel: OpenVINO below diffusers' pipeline, float or with its hybrid quantisation of diffusion models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from latents import openvino_unets
from optimum.exporters.openvino.convert import export_tokenizer
from optimum.intel import OVStableDiffusionPipeline, OVWeightQuantizationConfig
from PIL import Image

#: What its hybrid quantisation is calibrated with; its own choice is a dataset that has to be fetched.
PROMPTS = ["a red apple on a table", "a photograph of a cat", "mountains at sunset, oil painting", "a city at night"]


def prepare(model: Path, folder: Path, size: int, options: dict[str, str]) -> None:
    """Export, and quantise as its documentation says for diffusion models."""
    quantised = None
    if options["weights"] == "hybrid":
        quantised = OVWeightQuantizationConfig(bits=8, quant_method="hybrid", dataset=PROMPTS, num_samples=8)
    # Weights that are not to be compressed are kept as float16, its default for OpenVINO files of this size.
    pipe = OVStableDiffusionPipeline.from_pretrained(
        model, export=True, compile=False, load_in_8bit=False, quantization_config=quantised, safety_checker=None
    )
    pipe.save_pretrained(folder)
    # As its command line does, for OpenVINO GenAI.
    export_tokenizer(pipe.tokenizer, folder / "tokenizer")


class Pipeline:
    def __init__(self, folder: Path, size: int, options: dict[str, str]) -> None:
        pipe = OVStableDiffusionPipeline.from_pretrained(folder, compile=False, safety_checker=None)
        pipe.reshape(batch_size=1, height=size, width=size, num_images_per_prompt=1)
        pipe.compile()
        pipe.set_progress_bar_config(disable=True)
        self._pipe, self._size = pipe, size

    def __call__(self, prompt: str, steps: int, seed: int) -> Image.Image:
        generator, size = np.random.RandomState(seed), self._size
        made = self._pipe(prompt, height=size, width=size, num_inference_steps=steps, generator=generator)
        return made.images[0]


def unets(folder: Path, size: int, options: dict[str, str], count: int) -> Any:
    """UNets of ``count`` tasks."""
    return openvino_unets(folder, size, count)
