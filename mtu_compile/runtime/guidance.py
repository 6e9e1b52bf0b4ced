"""Runs guidance (``mtu_compile.core.guidance``) on graphs of a fixed batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.guidance import GuidanceRow
from mtu_compile.core.notices import Notice
from mtu_compile.runtime.engine import OUTPUT, Engine

Array = NDArray[Any]


Rows = TypeVar("Rows", tuple[GuidanceRow, ...], Array)

#: The input [b, D] of a UNet that takes the guidance scale, by the name diffusers and OpenVINO GenAI know it.
SCALE_INPUT = "timestep_cond"


def embed_scale(scale: float, dim: int, samples: int = 1) -> NDArray[np.float32]:
    """A guidance scale as the input of a latent consistency model's UNet: [samples, dim], all rows equal.

    The sines and cosines of 1000 · (scale - 1) at ``dim // 2`` frequencies each, in float32 and in the order of
    operations of diffusers 0.42 (``LatentConsistencyModelPipeline.get_guidance_scale_embedding``), which the model was
    trained with: arguments go into the thousands, where a float32 is coarse.
    """
    half = dim // 2
    step = np.float32(np.log(np.float32(10000.0))) / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    angles = np.float32(scale - 1) * np.float32(1000) * frequencies
    embedded = np.zeros((samples, dim), np.float32)
    embedded[:, :half] = np.sin(angles)
    embedded[:, half : 2 * half] = np.cos(angles)
    return embedded


def fill(rows: Rows, batch: int) -> Rows:
    """``rows`` repeated at the end until graphs of ``batch`` samples take all of them: the graph's batch is fixed."""
    missing = -len(rows) % batch
    if isinstance(rows, tuple):
        return rows + (rows[-1],) * missing
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows


def run(unet: Engine, inputs: Mapping[str, Array], batch: int) -> Array:
    """The UNet's answers [n, C, h, w] for n samples, a multiple of ``batch``, in as many runs as that takes.

    Args:
        unet: a UNet for ``batch`` samples.
        inputs: arrays of n samples each; and ``timestep`` [1], which every run gets.
    """
    samples = len(inputs["sample"])
    if samples == batch:
        return unet(inputs)[OUTPUT]
    parts = [
        {name: array if name == "timestep" else array[start : start + batch] for name, array in inputs.items()}
        for start in range(0, samples, batch)
    ]
    return np.concatenate([unet(part)[OUTPUT].copy() for part in parts])  # an engine may write over its last answer


def batch_notice(rows: int, batch: int) -> Notice | None:
    """What there is to say where a run wants ``rows`` samples a step of a graph for ``batch``."""
    if rows == batch:
        return None
    if rows < batch:
        message = (
            f"there is no guidance at these scales, and the graph computes its {batch} samples a step all the same"
        )
        hint = "a bundle whose task has a guidance_scale of 1 or less computes one"
    else:
        runs = -(-rows // batch)
        message = f"guidance takes {rows} samples a step, and the graph computes {batch}: it is run {runs} times a step"
        hint = f"a bundle whose task has a guidance_scale above 1 computes {rows} at once"
    return Notice("guidance-samples", message, hint, {"samples": rows, "batch": batch})
