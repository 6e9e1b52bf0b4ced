"""stable-diffusion.cpp by its Python binding; weights converted while they are loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from PIL import Image
from stable_diffusion_cpp import StableDiffusion


def prepare(model: Path, folder: Path, size: int, options: dict[str, str]) -> None:
    """Nothing: it reads diffusers' folders."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model").unlink(missing_ok=True)
    (folder / "model").symlink_to(model.resolve())


class Pipeline:
    def __init__(self, folder: Path, size: int, options: dict[str, str]) -> None:
        self._size = size
        self._pipe = StableDiffusion(
            model_path=str(folder / "model"),
            wtype=options["type"],
            n_threads=len(os.sched_getaffinity(0)),
            diffusion_flash_attn=True,
            verbose=False,
        )

    def __call__(self, prompt: str, steps: int, seed: int) -> Image.Image:
        try:
            (picture,) = self._pipe.generate_image(
                prompt=prompt,
                width=self._size,
                height=self._size,
                sample_steps=steps,
                seed=seed,
                cfg_scale=7.5,
                sample_method="euler",
            )
        except ValueError as error:
            # What the binding makes of a model that was not opened: the library goes by the weights of published ones.
            raise RuntimeError("it does not know this network (get sd version from file failed)") from error
        return picture


def unets(folder: Path, size: int, options: dict[str, str], count: int) -> Any:
    """Not possible apart from the rest: whole models of ``count`` tasks, each having made a picture of one step."""
    kept = [Pipeline(folder, size, options) for _ in range(count)]
    for one in kept:
        one("", 1, 0)
    return kept
