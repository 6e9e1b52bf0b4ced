"""diffusers on PyTorch, eager or compiled (channels last and inductor's freezing, as PyTorch recommends for CPUs)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from latents import unet_shapes
from PIL import Image


def prepare(model: Path, folder: Path, size: int, options: dict[str, str]) -> None:
    """Nothing: it reads the model as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").unlink(missing_ok=True)
    (folder / "model").symlink_to(model.resolve())


class Pipeline:
    def __init__(self, folder: Path, size: int, options: dict[str, str]) -> None:
        self._pipe, self._size = _open(folder, options), size
        self._pipe.set_progress_bar_config(disable=True)

    @torch.inference_mode()
    def __call__(self, prompt: str, steps: int, seed: int) -> Image.Image:
        generator, size = torch.Generator().manual_seed(seed), self._size
        made = self._pipe(prompt, height=size, width=size, num_inference_steps=steps, generator=generator)
        return made.images[0]


def _open(folder: Path, options: dict[str, str]) -> Any:
    dtype = getattr(torch, options["dtype"])
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model", torch_dtype=dtype, safety_checker=None)
    if options.get("compile"):
        import torch._inductor.config as inductor

        inductor.freezing = True
        pipe.unet = torch.compile(pipe.unet.to(memory_format=torch.channels_last))
        pipe.vae.decode = torch.compile(pipe.vae.decode)
    return pipe


@torch.inference_mode()
def unets(folder: Path, size: int, options: dict[str, str], count: int) -> Any:
    """UNets of ``count`` tasks, each run once."""
    from diffusers import UNet2DConditionModel

    dtype = getattr(torch, options["dtype"])
    found = [
        UNet2DConditionModel.from_pretrained(folder / "model", subfolder="unet", torch_dtype=dtype)
        for _ in range(count)
    ]
    shapes = unet_shapes(folder / "model", size)
    for unet in found:
        unet(torch.zeros(shapes["sample"], dtype=dtype), 500, torch.zeros(shapes["encoder_hidden_states"], dtype=dtype))
    return found
