"""How a metric's values are drawn from what was measured of a task: from each call, from deltas, from the pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from mtu_compile.accuracy.calls import GuidanceMetrics, PooledGuidance, StepMetrics
from mtu_compile.accuracy.formulas import decibels
from mtu_compile.accuracy.pictures import Perceptual
from mtu_compile.accuracy.task_metrics import ClipMetrics, RegionMetrics, TaskMetrics, TruthMetrics
from mtu_compile.runtime import Result
from mtu_compile.runtime.reference import Trajectory


@dataclass(frozen=True)
class Reading:
    """A value of a metric, and where it was read.

    Attributes:
        value: ``None`` if it does not apply or was not measured.
        direction: of guidance.
        timestep, call: of a UNet call: the scheduler's timestep, and its index among the recorded ones.
    """

    value: float | None
    direction: str | None = None
    timestep: float | None = None
    call: int | None = None


class Draw(Protocol):
    """Readings of the metric called ``name``; where nothing was measured one of ``None``, or none at all."""

    def __call__(self, measured: TaskMetrics, name: str) -> Sequence[Reading]: ...


@dataclass(frozen=True)
class PerCall:
    """One reading a UNet call."""

    of: Callable[[StepMetrics], float]

    def __call__(self, measured: TaskMetrics, name: str) -> Sequence[Reading]:
        if not measured.steps:
            return (Reading(None),)
        return [Reading(self.of(step), None, step.timestep, i) for i, step in enumerate(measured.steps)]


@dataclass(frozen=True)
class PerDelta:
    """One reading a UNet call and direction of guidance; none without guidance."""

    of: Callable[[GuidanceMetrics], float]

    def __call__(self, measured: TaskMetrics, name: str) -> Sequence[Reading]:
        return [
            Reading(self.of(delta), delta.direction, step.timestep, i)
            for i, step in enumerate(measured.steps)
            for delta in step.guidance
        ]


@dataclass(frozen=True)
class PooledDeltas:
    """One reading a direction of guidance, pooled over all UNet calls; none without guidance."""

    of: Callable[[PooledGuidance], float]

    def __call__(self, measured: TaskMetrics, name: str) -> Sequence[Reading]:
        return [Reading(self.of(pooled), direction) for direction, pooled in measured.guidance.items()]


@dataclass(frozen=True)
class PerPicture:
    """The mean over the pictures in which it could be measured.

    Attributes:
        measure: what the float original did, what the candidate made from the same noise with nothing pasted back, and
            metrics that need torch → the value, or ``None``.
    """

    measure: Callable[[Trajectory, Result, Perceptual], float | None]

    def __call__(self, measured: TaskMetrics, name: str) -> Sequence[Reading]:
        return (Reading(mean([picture.values.get(name) for picture in measured.pictures])),)


@dataclass(frozen=True)
class PooledRegion:
    """Squared errors pooled over the regions' pixels of all pictures, decibels.

    A picture in which nothing differs must not outweigh one that is spoilt.

    Attributes:
        of: PSNR of one picture's region, decibels.
        pixels: how large that region is.
    """

    of: Callable[[RegionMetrics], float | None]
    pixels: Callable[[RegionMetrics], int]

    def __call__(self, measured: TaskMetrics, name: str) -> Sequence[Reading]:
        known = [(psnr, self.pixels(region)) for region in measured.regions if (psnr := self.of(region)) is not None]
        if not known:
            return (Reading(None),)
        error = sum(10 ** (-psnr / 10) * pixels for psnr, pixels in known)
        return (Reading(decibels(sum(pixels for _, pixels in known), error)),)


@dataclass(frozen=True)
class ChangedShare:
    """Which share of the pictures the task was to change."""

    def __call__(self, measured: TaskMetrics, name: str) -> Sequence[Reading]:
        inside = sum(region.inside_pixels for region in measured.regions)
        outside = sum(region.outside_pixels for region in measured.regions)
        return (Reading(inside / (inside + outside) if measured.regions else None),)


@dataclass(frozen=True)
class MeanTruth:
    """The mean over the pictures that have a wanted one."""

    of: Callable[[TruthMetrics], float | None]

    def __call__(self, measured: TaskMetrics, name: str) -> Sequence[Reading]:
        truths = [picture.truth for picture in measured.pictures if picture.truth is not None]
        return (Reading(mean([self.of(truth) for truth in truths])),)


@dataclass(frozen=True)
class MeanClip:
    """The mean over the pictures that a CLIP model was asked about."""

    of: Callable[[ClipMetrics], float | None]

    def __call__(self, measured: TaskMetrics, name: str) -> Sequence[Reading]:
        clips = [picture.clip for picture in measured.pictures if picture.clip is not None]
        return (Reading(mean([self.of(clip) for clip in clips])),)


def mean(values: Sequence[float | None]) -> float | None:
    """Over those that were measured; ``None`` if none was."""
    measured = [value for value in values if value is not None]
    return fmean(measured) if measured else None
