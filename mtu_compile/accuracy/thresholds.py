"""How accurate a task has to be, and the verdict.

A model has its own thresholds (``accuracy.threshold_file``); for what they do not say, and for bundles that carry none,
there are the defaults of the precision, which tell a defect from rounding, whatever the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from mtu_compile.accuracy.metrics import judged
from mtu_compile.accuracy.task_metrics import TaskMetrics
from mtu_compile.core.errors import AccuracyError, BundleError
from mtu_compile.core.precision import Precision


@dataclass(frozen=True)
class Thresholds:
    """Least accuracy of a task.

    Attributes:
        limits: by name of the metric; one that is not here is not judged, which has to be asked for.
    """

    limits: Mapping[str, float]

    def __getitem__(self, metric: str) -> float | None:
        return self.limits.get(metric)

    @classmethod
    def default(cls, precision: str) -> Thresholds:
        """Those of a precision; ``AccuracyError`` where there are none."""
        try:
            return cls({metric.name: metric.defaults[precision] for metric in judged() if metric.defaults})  # type: ignore[index]
        except KeyError:
            known = ", ".join(get_args(Precision))
            raise AccuracyError(f"no accuracy thresholds for precision {precision!r}", hint=f"known: {known}") from None

    @classmethod
    def of_bundle(cls, precision: str, own: Mapping[str, float | None] | None) -> Thresholds:
        """The defaults of a bundle's precision, and over them what it carries for a task.

        Raises:
            BundleError: it asks for a metric that this version does not measure.
        """
        known = {metric.name for metric in judged()}
        if unknown := sorted(set(own or {}) - known):
            raise BundleError(
                f"the bundle has a threshold for {unknown[0]!r}, which this version does not measure",
                hint="check it with the version that built it, or give --thresholds",
            )
        return cls.default(precision).changed(own or {})

    def changed(self, limits: Mapping[str, float | None]) -> Thresholds:
        """These with others for the metrics in ``limits``; ``None`` leaves one unjudged."""
        return Thresholds({name: limit for name, limit in {**self.limits, **limits}.items() if limit is not None})

    def without(self, metrics: Collection[str]) -> Thresholds:
        """These, and ``metrics`` unjudged."""
        return Thresholds({name: limit for name, limit in self.limits.items() if name not in metrics})

    def of_calls(self) -> Thresholds:
        """Those of single UNet calls alone, for which no pictures are needed."""
        return self.without([metric.name for metric in judged() if not metric.of_calls])

    def to_json(self) -> dict[str, float | None]:
        """Of every metric that can be judged; ``None`` is not judged."""
        return {metric.name: self[metric.name] for metric in judged()}


@dataclass(frozen=True)
class Failure:
    """A metric on the wrong side of its threshold.

    Attributes:
        metric: name of the metric, with its direction of guidance in front.
        value: what was measured; ``None`` if it was not.
        threshold: what was wanted.
        timestep: where, for metrics of single UNet calls.
        above: whether the threshold is the most that is allowed, not the least.
        call: index of the UNet call, for metrics of single calls.
    """

    metric: str
    value: float | None
    threshold: float
    timestep: float | None = None
    above: bool = False
    call: int | None = None

    def __str__(self) -> str:
        where = "" if self.timestep is None else f" at timestep {self.timestep:g}"
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"{self.metric} {value}{where}, threshold {self.threshold:.4g}"


def judge(measured: TaskMetrics, thresholds: Thresholds) -> list[Failure]:
    """Everything beyond its threshold; an empty list is a pass. A metric that was not measured fails its threshold."""
    failures = []
    for metric in judged():
        if (threshold := thresholds[metric.name]) is None:
            continue
        for reading in metric.readings(measured):
            if (missed := metric.missed(reading.value, threshold)) is not None:
                limit, above = missed
                name = metric.name if reading.direction is None else f"{reading.direction}_{metric.name}"
                failures.append(Failure(name, reading.value, limit, reading.timestep, above, reading.call))
    return failures


def in_words(failures: Sequence[Failure], calls: int) -> tuple[str, ...]:
    """One phrase for each metric: those of single UNet calls say at how many of ``calls`` and the worst of them."""
    groups: dict[tuple[str, bool], list[Failure]] = {}
    for failure in failures:
        groups.setdefault((failure.metric, failure.above), []).append(failure)
    return tuple(_phrase(group, calls) for group in groups.values())


def _phrase(group: Sequence[Failure], calls: int) -> str:
    first = group[0]
    if first.call is None:
        return str(first)
    worst = min(group, key=_badness)
    side, where = "above" if first.above else "below", str(worst).removeprefix(f"{worst.metric} ").split(",")[0]
    return f"{first.metric} {side} {first.threshold:.4g} at {len(group)} of {calls} calls, worst {where}"


def _badness(failure: Failure) -> float:
    """Smaller is worse; NaN is the worst."""
    if failure.value is None or math.isnan(failure.value):
        return -math.inf
    return -failure.value if failure.above else failure.value
