"""Kinds of classifier-free guidance: which samples a UNet gets for one picture, and how its answers are combined.

``text`` is Ho and Salimans' ("Classifier-Free Diffusion Guidance", 2022). ``text+image`` is InstructPix2Pix (Brooks et
al. 2023, equation 3), which the paper takes for editing and inpainting. ``embedded`` is latent consistency models: one
sample, and the scale itself is an input of the UNet. Works on arrays of numpy and of PyTorch alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Guidance = Literal["none", "text", "text+image", "embedded"]

Sample = TypeVar("Sample", bound=Any)


@dataclass(frozen=True)
class GuidanceRow:
    """One sample of the UNet's batch: with the prompt (or the negative prompt), with the condition (or zeros)."""

    prompt: bool
    condition: bool


@dataclass(frozen=True)
class Direction:
    """A difference of two samples that guidance scales: from ``ROWS[kind][start]`` to ``ROWS[kind][end]``."""

    name: Literal["text", "image"]
    start: int
    end: int


#: By kind, the samples of one picture.
ROWS: Mapping[Guidance, tuple[GuidanceRow, ...]] = {
    "none": (GuidanceRow(True, True),),
    "text": (GuidanceRow(False, True), GuidanceRow(True, True)),
    "text+image": (GuidanceRow(False, False), GuidanceRow(False, True), GuidanceRow(True, True)),
    "embedded": (GuidanceRow(True, True),),
}

#: By kind, what is scaled.
DIRECTIONS: Mapping[Guidance, tuple[Direction, ...]] = {
    "none": (),
    "text": (Direction("text", 0, 1),),
    "text+image": (Direction("image", 0, 1), Direction("text", 1, 2)),
    "embedded": (),
}


def active_guidance(guidance: Guidance, scale: float, image_scale: float) -> Guidance:
    """The guidance that is left at these scales; ``"none"``, the conditional prediction alone, where diffusers has it.

    Classifier-free guidance is off at a scale of 1 or less (``StableDiffusionPipeline``); that by text and image also
    at an image scale below 1 (``StableDiffusionInstructPix2PixPipeline``).
    """
    off = (guidance == "text" and scale <= 1) or (guidance == "text+image" and (scale <= 1 or image_scale < 1))
    return "none" if off else guidance


def combine(guidance: Guidance, answers: Sequence[Sample], scale: float, image_scale: float) -> Sample:
    """The guided prediction.

    Args:
        guidance: the kind.
        answers: the UNet's, one for each of ``ROWS[guidance]``.
        scale: of the text direction.
        image_scale: of the image direction.
    """
    scales = {"text": scale, "image": image_scale}
    guided = answers[0]
    for direction in DIRECTIONS[guidance]:
        guided = guided + scales[direction.name] * (answers[direction.end] - answers[direction.start])
    return guided
