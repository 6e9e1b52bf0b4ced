"""What this project makes: a bundle for this CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtu_compile import runtime


def prepare(model: Path, folder: Path, size: int, options: dict[str, str]) -> None:
    """`mtu-compile build`."""
    command = [
        sys.executable,
        "-m",
        "mtu_compile",
        "build",
        str(model),
        "--target",
        "cpu",
        "--force",
        "-o",
        str(folder),
    ]
    command += [f"--{options['precision']}", "--routing", options["routing"], "--size", f"{size}x{size}"]
    command += ["--cache", str(folder.parent / "cache")]
    if options.get("decoder") == "int8":
        command.append("--int8-decoder")
    if options["routing"] == "static":
        command += ["--task", "t2i"]
    if options.get("weights") == "random":
        # Pictures of random weights say nothing: no search for what accuracy needs, no gate, the least calibration.
        command += ["--no-mixed-precision", "--accuracy-gate", "off", "--steps", "4"]
        command += ["--calibration-pictures", "1", "--check-pictures", "1"]
    subprocess.run(command, check=True)


class Pipeline:
    def __init__(self, folder: Path, size: int, options: dict[str, str]) -> None:
        self._runtime = runtime.load(folder)

    def __call__(self, prompt: str, steps: int, seed: int) -> Image.Image:
        return self._runtime.run("t2i", prompt, steps=steps, seed=seed).image


def unets(folder: Path, size: int, options: dict[str, str], count: int) -> Any:
    """UNets of the bundle's first ``count`` tasks, each run once."""
    bundle = runtime.load(folder)
    if count > len(bundle.tasks):
        raise ValueError(f"the bundle has {len(bundle.tasks)} of {count} tasks")
    for task in bundle.tasks[:count]:
        unet = bundle.unet(task.name)
        sides = unet.inputs["sample"].shape[2:]
        known = {"sample": (task.unet_batch, 4 + task.condition_channels(4), *sides), "timestep": (1,)}
        text = unet.inputs["encoder_hidden_states"].shape
        known["encoder_hidden_states"] = (task.unet_batch, text[1] or 77, text[2] or 768)
        unet({name: np.zeros(shape, np.float32) for name, shape in known.items()})
    return bundle
