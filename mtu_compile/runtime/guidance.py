"""What guidance (``mtu_compile.core.guidance``) asks of a graph: the scale as an input, and samples of its batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.notices import Notice

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


def batch_notice(samples: int, batch: int | None, *, shared: bool = False) -> Notice | None:
    """What there is to say where a step takes ``samples`` of a graph for ``batch`` (``None``: any number).

    Args:
        samples: of the step.
        batch: of the graph.
        shared: all tasks share the graph, so that its batch is nobody's own.
    """
    if batch is None or samples == batch:
        return None
    facts = {"samples": samples, "batch": batch}
    runs = -(-samples // batch)
    if shared:
        if samples % batch == 0:
            return None
        message = f"a step takes {samples} samples, and the graph, which all tasks share, computes {runs * batch}"
        return Notice("guidance-samples", message, "pictures that are asked for together fill its batch", facts)
    if samples < batch:
        message = (
            f"there is no guidance at these scales, and the graph computes its {batch} samples a step all the same"
        )
        hint = "a bundle whose task has a guidance_scale of 1 or less computes one"
    else:
        message = (
            f"guidance takes {samples} samples a step, and the graph computes {batch}: it is run {runs} times a step"
        )
        hint = f"a bundle whose task has a guidance_scale above 1 computes {samples} at once"
    return Notice("guidance-samples", message, hint, facts)
