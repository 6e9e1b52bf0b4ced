"""ONNX Runtime below diffusers' pipeline, by optimum-onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from latents import unet_shapes
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTStableDiffusionPipeline
from PIL import Image


def prepare(model: Path, folder: Path, size: int, options: dict[str, str]) -> None:
    """Export to ONNX."""
    # Told what it would look for in a folder's files, where it does not find it.
    main_export(str(model), folder, task="text-to-image", library_name="diffusers", do_validation=False)


class Pipeline:
    def __init__(self, folder: Path, size: int, options: dict[str, str]) -> None:
        self._pipe = ORTStableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        self._pipe.set_progress_bar_config(disable=True)
        self._size = size

    def __call__(self, prompt: str, steps: int, seed: int) -> Image.Image:
        generator, size = torch.Generator().manual_seed(seed), self._size
        made = self._pipe(prompt, height=size, width=size, num_inference_steps=steps, generator=generator)
        return made.images[0]


def unets(folder: Path, size: int, options: dict[str, str], count: int) -> Any:
    """UNets of ``count`` tasks, each run once."""
    import onnxruntime

    kept, shapes = [], unet_shapes(folder, size)
    for _ in range(count):
        session = onnxruntime.InferenceSession(folder / "unet" / "model.onnx", providers=["CPUExecutionProvider"])
        feed: dict[str, Any] = {}
        for port in session.get_inputs():
            shape = shapes[port.name] if port.shape else ()
            feed[port.name] = np.zeros(shape, np.int64 if "int64" in port.type else np.float32)
        session.run(None, feed)
        kept.append(session)
    return kept
