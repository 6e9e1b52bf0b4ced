"""Fewer whole UNet steps, as a manifest has them: the shallow UNet, and which steps need the whole one."""

from __future__ import annotations

from dataclasses import dataclass, field

from mtu_compile.bundle.accuracy import Limits
from mtu_compile.bundle.engine import EngineRef
from mtu_compile.bundle.kinds import Count, Positive, Share, Steps, Text, Timestep


@dataclass(frozen=True)
class StepCache:
    """How a task does with fewer whole UNet calls.

    Attributes:
        engine: the shallow UNet, which takes ``deep_feature`` [b, C, h, w] beside what it needs of a UNet's inputs.
        whole_at: timesteps, from the largest down. The first call of a picture is whole, and so is the first at or
            below each of these, with any sampler and number of steps; at all others the shallow UNet runs.
        slope: how much of its last change, by timestep, the deep feature is carried on: 0 takes that of the last whole
            call, 1 goes on along the line through those of the last two.
        limits: by metric of pictures, what they have to reach against the float original's, which caches nothing.
    """

    engine: EngineRef
    whole_at: tuple[Timestep, ...] = ()
    slope: Share = 1.0
    limits: Limits = field(default_factory=dict)


@dataclass(frozen=True)
class TriedSchedule:
    """One schedule that a build tried.

    Attributes:
        whole: indices of the whole calls among those of the default steps.
        slope: see ``StepCache``.
        metrics: what the pictures reached; of one that was given up early, so far.
        pictures: how many were made.
        passed: it reached the limits.
    """

    whole: tuple[Count, ...]
    slope: Share
    metrics: Limits
    pictures: Positive
    passed: bool


@dataclass(frozen=True)
class StepCacheRecord:
    """What a build tried to make a task do with fewer whole UNet calls.

    Attributes:
        steps: denoising steps.
        shallow_share: multiply-adds of the shallow UNet, of the whole one's.
        most: largest interval between whole steps.
        pictures: that a schedule was tried on, at most.
        tried: the schedules, in their order.
        reason: why none was taken, if none was.
    """

    steps: Steps
    shallow_share: Share
    most: Count = 0
    pictures: Count = 0
    tried: tuple[TriedSchedule, ...] = ()
    reason: Text | None = None
