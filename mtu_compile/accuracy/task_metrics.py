"""What is measured of one task: its UNet calls, each of its pictures, and the means that are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any, Literal

from mtu_compile.accuracy.metrics import PooledGuidance, StepMetrics, decibels, pool_guidance


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
    """One picture of a candidate against the float original's; ``None`` is "does not apply" or "not measured".

    Attributes:
        latent_psnr_db: final latents, peak = the reference's range, decibels.
        psnr_db: peak 1, decibels.
        ssim: structural similarity (Wang et al., 2004).
        colour_difference: mean CIEDE2000 over the pixels; 1 is about the least that is seen.
        vif: visual information fidelity (Sheikh & Bovik, 2006) of the picture; 1 is perfect, 0 is nothing left.
        region: inside and outside of what the task was to change.
        truth: against the wanted picture.
        clip: what a CLIP model says of it.
    """

    latent_psnr_db: float
    psnr_db: float
    ssim: float | None = None
    colour_difference: float | None = None
    vif: float | None = None
    region: RegionMetrics | None = None
    truth: TruthMetrics | None = None
    clip: ClipMetrics | None = None


@dataclass(frozen=True)
class TaskMetrics:
    """Everything measured of one task; ``None`` is "not measured".

    Attributes:
        steps: the UNet calls, in the order they were recorded.
        latent_psnr_db, image_psnr_db, ssim, colour_difference, vif: means over the pictures, see ``PictureMetrics``.
        inside_psnr_db, outside_psnr_db: squared errors pooled over the regions' pixels of all pictures, decibels: a
            picture in which nothing differs must not outweigh one that is spoilt.
        truth_drop_db: mean of ``TruthMetrics.drop_db``.
        pictures: each picture.
    """

    steps: tuple[StepMetrics, ...]
    latent_psnr_db: float | None = None
    image_psnr_db: float | None = None
    ssim: float | None = None
    colour_difference: float | None = None
    vif: float | None = None
    inside_psnr_db: float | None = None
    outside_psnr_db: float | None = None
    truth_drop_db: float | None = None
    pictures: tuple[PictureMetrics, ...] = ()

    @classmethod
    def of(cls, steps: Sequence[StepMetrics], pictures: Sequence[PictureMetrics]) -> TaskMetrics:
        """The means over one or more pictures."""
        regions = [one.region for one in pictures if one.region is not None]
        return cls(
            tuple(steps),
            fmean(one.latent_psnr_db for one in pictures),
            fmean(one.psnr_db for one in pictures),
            _mean([one.ssim for one in pictures]),
            _mean([one.colour_difference for one in pictures]),
            _mean([one.vif for one in pictures]),
            _pooled_psnr_db([(one.inside_psnr_db, one.inside_pixels) for one in regions]),
            _pooled_psnr_db([(one.outside_psnr_db, one.outside_pixels) for one in regions]),
            _mean([None if one.truth is None else one.truth.drop_db for one in pictures]),
            tuple(pictures),
        )

    @property
    def guidance(self) -> dict[str, PooledGuidance]:
        """Each direction over all UNet calls."""
        return pool_guidance(self.steps)

    @property
    def region(self) -> dict[str, Any] | None:
        """Where the task was to change the pictures, and how well the rest stayed (pooled, decibels)."""
        regions = [one.region for one in self.pictures if one.region is not None]
        if not regions:
            return None
        inside, outside = sum(r.inside_pixels for r in regions), sum(r.outside_pixels for r in regions)
        pooled = {
            name: _pooled_psnr_db([(getattr(r, name), r.outside_pixels) for r in regions])
            for name in ("source_psnr_db", "reference_source_psnr_db")
        }
        return {"kind": regions[0].kind, "share": inside / (inside + outside), **pooled}

    @property
    def truth(self) -> dict[str, float | None] | None:
        """Means of ``TruthMetrics``."""
        truths = [one.truth for one in self.pictures if one.truth is not None]
        names = [one.name for one in fields(TruthMetrics)]
        return {name: _mean([getattr(one, name) for one in truths]) for name in names} if truths else None

    @property
    def clip(self) -> dict[str, float | None] | None:
        """Means of ``ClipMetrics``."""
        clips = [one.clip for one in self.pictures if one.clip is not None]
        names = [one.name for one in fields(ClipMetrics)]
        return {name: _mean([getattr(one, name) for one in clips]) for name in names} if clips else None

    def to_json(self) -> dict[str, Any]:
        """For the manifest and the report; all numbers are finite."""
        return asdict(self)


def _mean(values: Sequence[float | None]) -> float | None:
    """Over those that were measured."""
    measured = [value for value in values if value is not None]
    return fmean(measured) if measured else None


def _pooled_psnr_db(regions: Sequence[tuple[float | None, int]]) -> float | None:
    """PSNR of the mean squared error over several regions of (PSNR in decibels, pixels)."""
    measured = [(psnr, pixels) for psnr, pixels in regions if psnr is not None]
    if not measured:
        return None
    error = sum(10 ** (-psnr / 10) * pixels for psnr, pixels in measured)
    return decibels(sum(pixels for _, pixels in measured), error)
