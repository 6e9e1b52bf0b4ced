"""Classifier-free guidance: which samples the UNet gets for one picture, and how its answers are combined.

``text+image`` is InstructPix2Pix (Brooks et al. 2023, equation 3), which the paper takes for editing and inpainting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from mtu_compile.core.tasks import Guidance

Array = NDArray[Any]


@dataclass(frozen=True)
class Row:
    """One sample of the UNet's batch: with the prompt (or the negative prompt), with the condition (or zeros)."""

    prompt: bool
    condition: bool


ROWS: Mapping[Guidance, tuple[Row, ...]] = {
    "none": (Row(True, True),),
    "text": (Row(False, True), Row(True, True)),
    "text+image": (Row(False, False), Row(False, True), Row(True, True)),
}


def combine(guidance: Guidance, outputs: Array, scale: float, image_scale: float) -> Array:
    """The guided prediction.

    Args:
        guidance: the task's kind of guidance.
        outputs: [b, C, h, w], the UNet's answers for ``ROWS[guidance]``.
        scale: of the text direction.
        image_scale: of the image direction.

    Returns:
        [1, C, h, w].
    """
    if guidance == "none":
        return outputs[:1]
    if guidance == "text":
        without, full = outputs[0:1], outputs[1:2]
        return without + scale * (full - without)
    nothing, image, full = outputs[0:1], outputs[1:2], outputs[2:3]
    return nothing + image_scale * (image - nothing) + scale * (full - image)
