"""What is measured of one task: its UNet calls and each of its pictures; ``accuracy.metrics`` draws numbers from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mtu_compile.accuracy.calls import PooledGuidance, StepMetrics, pool_guidance


@dataclass(frozen=True)
class RegionMetrics:
    """Inside and outside the part of a picture that the task was to change.

    Attributes:
        kind: ``"mask"``, given with the task; or ``"edit"``, where the float original changed the source picture.
        inside_pixels, outside_pixels: how large the two are.
        inside_psnr_db: candidate against the float original's picture, peak 1, decibels; ``None`` if nothing is inside.
        outside_psnr_db: likewise outside.
        source_psnr_db: candidate against the source picture, outside: how well what was to stay did stay.
        reference_source_psnr_db: the float original against the source picture, outside.
    """

    kind: Literal["mask", "edit"]
    inside_pixels: int
    outside_pixels: int
    inside_psnr_db: float | None
    outside_psnr_db: float | None
    source_psnr_db: float | None
    reference_source_psnr_db: float | None


@dataclass(frozen=True)
class TruthMetrics:
    """Candidate and float original against the wanted picture.

    Attributes:
        psnr_db, ssim: candidate against the truth (decibels, peak 1); ``ssim`` is ``None`` where it cannot be measured.
        reference_psnr_db, reference_ssim: the float original against the truth.
    """

    psnr_db: float
    ssim: float | None
    reference_psnr_db: float
    reference_ssim: float | None

    @property
    def drop_db(self) -> float:
        """By how much the candidate is further from the truth than the float original, decibels of PSNR."""
        return self.reference_psnr_db - self.psnr_db


@dataclass(frozen=True)
class ClipMetrics:
    """What a CLIP model says of the pictures; cosines of its embeddings.

    Attributes:
        image: candidate's picture and the float original's.
        text, reference_text: prompt and candidate's picture, prompt and the float original's; ``None`` without prompt.
    """

    image: float
    text: float | None
    reference_text: float | None


@dataclass(frozen=True)
class PictureMetrics:
    """One picture of a candidate against the float original's.

    Attributes:
        values: by metric (``accuracy.metrics``), what each that measures single pictures says; ``None`` is "does not
            apply" or "not measured".
        region: inside and outside of what the task was to change, or ``None`` where it makes the whole picture.
        truth: against the wanted picture, where there is one.
        clip: what a CLIP model says of it, where there is one.
    """

    values: Mapping[str, float | None] = field(default_factory=dict)
    region: RegionMetrics | None = None
    truth: TruthMetrics | None = None
    clip: ClipMetrics | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest and the report; all numbers are finite."""
        groups = {"region": self.region, "truth": self.truth, "clip": self.clip}
        return {**self.values, **{name: None if one is None else asdict(one) for name, one in groups.items()}}


@dataclass(frozen=True)
class TaskMetrics:
    """Everything measured of one task.

    Attributes:
        steps: the UNet calls, in the order they were recorded.
        pictures: each picture.
    """

    steps: tuple[StepMetrics, ...]
    pictures: tuple[PictureMetrics, ...] = ()

    @property
    def guidance(self) -> dict[str, PooledGuidance]:
        """Each direction over all UNet calls."""
        return pool_guidance(self.steps)

    @property
    def regions(self) -> tuple[RegionMetrics, ...]:
        """Of the pictures that have one."""
        return tuple(picture.region for picture in self.pictures if picture.region is not None)
