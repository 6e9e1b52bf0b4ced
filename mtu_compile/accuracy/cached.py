"""How good pictures have to be that were made with fewer whole UNet calls, and what of them was measured.

Caching changes the picture, so it has thresholds of its own, against the float original, which caches nothing. They are
of pictures alone: no single UNet call is what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import stdev
from typing import Any

from mtu_compile.accuracy.metric import Metric
from mtu_compile.accuracy.metrics import judged
from mtu_compile.accuracy.readings import PerPicture
from mtu_compile.accuracy.task_metrics import PictureMetrics, TaskMetrics

#: What is asked for where a model says nothing else. Two seeds of one prompt have an SSIM of 0.5 or less; at 0.97 the
#: example's pictures differ in details that have to be looked for.
LIMITS: Mapping[str, float] = {"ssim": 0.97}


@dataclass(frozen=True)
class CachedPictures:
    """Pictures made with fewer whole UNet calls, held against limits.

    Attributes:
        limits: by metric; ``None`` is not judged.
        metrics: what was measured, by metric.
        least_ssim: of a single picture.
        failures: every miss, in words.
    """

    limits: Mapping[str, float | None]
    metrics: Mapping[str, float | None]
    least_ssim: float | None
    failures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        known = {name: value for name, value in self.metrics.items() if value is not None}
        return {**known, "least_ssim": self.least_ssim, "thresholds": dict(self.limits)}


def of_pictures() -> dict[str, Metric]:
    """The metrics that have thresholds and need no UNet calls, by name."""
    return {metric.name: metric for metric in judged() if not metric.of_calls and metric.name not in _OF_GUIDANCE}


#: Pooled over UNet calls.
_OF_GUIDANCE = ("pooled_guidance_ratio", "guidance_sqnr_db")


def judge_cached(pictures: Sequence[PictureMetrics], limits: Mapping[str, float | None]) -> CachedPictures:
    """Hold pictures against ``limits``; a metric that could not be measured is not judged."""
    measured, known = TaskMetrics((), tuple(pictures)), of_pictures()
    values = {name: metric.worst(measured) for name, metric in known.items()}
    failures = []
    for name, limit in limits.items():
        if limit is None or values.get(name) is None:
            continue
        if (missed := known[name].missed(values[name], limit)) is not None:
            failures.append(f"with the step cache {name} {values[name]:.4g}, threshold {missed[0]:.4g}")
    single = [value for one in pictures if (value := one.values.get("ssim")) is not None]
    return CachedPictures(dict(limits), values, min(single, default=None), tuple(failures))


def surely_reached(pictures: Sequence[PictureMetrics], limits: Mapping[str, float | None]) -> bool:
    """Whether other pictures can be expected to reach ``limits`` if these are a sample of them.

    A mean has to reach its limit with its standard error taken away. What could not be measured is not reached.
    """
    measured, known = TaskMetrics((), tuple(pictures)), of_pictures()
    for name, limit in limits.items():
        metric = known[name]
        if limit is None:
            continue
        if (value := metric.worst(measured)) is None:
            return False
        singles = [one for picture in pictures if (one := picture.values.get(name)) is not None]
        if isinstance(metric.draw, PerPicture) and len(singles) > 1:
            error = stdev(singles) / sqrt(len(singles))
            value += error if metric.better == "less" else -error
        if metric.missed(value, limit) is not None:
            return False
    return True


def cannot_reach(pictures: Sequence[PictureMetrics], total: int, limits: Mapping[str, float | None]) -> bool:
    """Whether ``total`` pictures would not surely reach their SSIM even if those not made yet were perfect."""
    limit = limits.get("ssim")
    singles = [value for one in pictures if (value := one.values.get("ssim")) is not None]
    return limit is not None and len(singles) > 0 and sum(singles) + total - len(singles) < limit * total
