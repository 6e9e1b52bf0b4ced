"""A model's own thresholds, ``thresholds.json``: read strictly, and suggested from what was measured.

    {
      "format": "mtu-thresholds-1",
      "thresholds": {"int8": {"t2i": {"sqnr_db": 19.0, "ssim": 0.94, "vif": null}}}
    }

By precision, task and metric; ``null`` leaves a metric unjudged, and what is left out has the default of the precision.
In the place of a precision ``step-cache`` says what pictures with fewer whole UNet calls have to reach in any of them.
The file is no part of the model's hash: it says how good a build has to be, not what is built.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args

from mtu_compile.accuracy.cached import LIMITS, of_pictures
from mtu_compile.accuracy.metric import MARGINS, Metric
from mtu_compile.accuracy.metrics import judged
from mtu_compile.accuracy.task_metrics import TaskMetrics
from mtu_compile.accuracy.thresholds import Thresholds
from mtu_compile.bundle import Manifest
from mtu_compile.bundle.units import last_word
from mtu_compile.core.errors import ConfigError, MtuError
from mtu_compile.core.precision import Precision
from mtu_compile.core.schema import Mismatch, Range, conform, read_json
from mtu_compile.core.tasks import TaskName

#: The file's name in a model's folder.
THRESHOLDS = "thresholds.json"
FORMAT = "mtu-thresholds-1"
HINT = "docs/accuracy.md says what belongs there; `mtu-compile check BUNDLE --suggest-thresholds` writes one"

#: In the place of a precision: of pictures with fewer whole UNet calls (``accuracy.cached``).
STEP_CACHE: Literal["step-cache"] = "step-cache"
Judged = Precision | Literal["step-cache"]

#: By task and metric.
Limits = Mapping[str, Mapping[str, float | None]]


def read_thresholds(path: Path, *, error: type[MtuError] = ConfigError) -> dict[Judged, Limits]:
    """By precision, task and metric, what the file asks for.

    Raises:
        MtuError: an ``error`` that names the entry: no such file, not one of thresholds, an unknown precision or
            metric, a number that the metric cannot have.
    """
    data = read_json(path, error=error, hint=HINT)
    try:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise Mismatch("format", repr(data.get("format")) if isinstance(data, dict) else None, f'"{FORMAT}"')
        if unknown := sorted(set(data) - {"format", "thresholds"}):
            raise Mismatch(unknown[0], "there", "no such entry")
        precisions = conform(Mapping[str, Mapping[str, Mapping[str, Any]]], data.get("thresholds"), "thresholds")
        return {precision: _tasks(precision, tasks) for precision, tasks in precisions.items()}
    except Mismatch as mismatch:
        raise mismatch.at(path, error=error, hint=HINT) from mismatch


def _tasks(precision: str, tasks: Mapping[str, Mapping[str, Any]]) -> Limits:
    place = f"thresholds.{precision}"
    known = (*get_args(Precision), STEP_CACHE)
    if precision not in known:
        raise Mismatch(place, "there", f"a precision: {', '.join(known)}")
    return {
        conform(TaskName, task, place): {
            name: _limit(f"{place}.{task}.{name}", name, one, of_pictures() if precision == STEP_CACHE else None)
            for name, one in row.items()
        }
        for task, row in tasks.items()
    }


def _limit(place: str, name: str, value: Any, known: Mapping[str, Metric] | None = None) -> float | None:
    metrics = known or {metric.name: metric for metric in judged()}
    if name not in metrics:
        raise Mismatch(place, "there", f"a metric: {', '.join(metrics)}")
    kind: Any = metrics[name].unit.kind
    if metrics[name].better == "one":
        kind = Annotated[float, Range(1e-3, 1)]  # what a ratio may shrink to: it may grow to the inverse
    limit: float | None = conform(kind | None, value, place)
    return limit


def for_tasks(
    thresholds: Mapping[Judged, Limits],
    precision: str,
    tasks: Collection[str],
    path: Path,
    *,
    error: type[MtuError] = ConfigError,
) -> Limits:
    """What ``thresholds``, read from ``path``, ask of each of ``tasks`` in ``precision``.

    Raises:
        MtuError: an ``error``: they name a task that is not one of ``tasks``.
    """
    for rows in thresholds.values():
        if unknown := [task for task in rows if task not in tasks]:
            raise error(
                f"{path} has thresholds of a task {unknown[0]!r}, which is not there",
                hint=f"the tasks are {', '.join(tasks)}: leave the others out",
            )
    rows = thresholds.get(precision, {})  # type: ignore[call-overload]
    return {task: rows.get(task, {}) for task in tasks}


def judged_by(manifest: Manifest, thresholds: Mapping[Judged, Limits] | None, path: Path | None) -> Manifest:
    """A bundle's manifest with the thresholds read from ``path`` in the place of its own; as it is without any.

    Raises:
        ConfigError: they name a task that the bundle does not have.
    """
    if thresholds is None:
        return manifest
    limits = for_tasks(thresholds, manifest.precision, manifest.tasks, path or Path(THRESHOLDS))
    cached = for_tasks(thresholds, STEP_CACHE, manifest.tasks, path or Path(THRESHOLDS))
    tasks = {
        name: replace(
            entry,
            thresholds=limits[name],
            step_cache=entry.step_cache and replace(entry.step_cache, limits={**LIMITS, **cached[name]}),
        )
        for name, entry in manifest.tasks.items()
    }
    return replace(manifest, tasks=tasks)


class Measured(Protocol):
    """A checked task (``verdict.TaskCheck``): what was measured of it, and what it was judged by."""

    @property
    def metrics(self) -> TaskMetrics: ...

    @property
    def thresholds(self) -> Thresholds: ...


def suggest(tasks: Mapping[str, Measured], precision: str) -> dict[str, Any]:
    """A file of thresholds for a model that measures like this: each value, and a margin for other pictures.

    A metric that was not judged, or of which so little is left that no margin has a meaning, is left out, and has the
    default of its precision. None is stricter than the default of fp32, which allows for the order of sums alone.

    Args:
        tasks: by name, what was measured.
        precision: it was measured in.
    """
    limits = {
        name: {
            metric.name: limit
            for metric in judged()
            if task.thresholds[metric.name] is not None and (limit := suggested(metric, task.metrics)) is not None
        }
        for name, task in tasks.items()
    }
    return {"format": FORMAT, "thresholds": {precision: limits}}


def laxer_than_defaults(file: Mapping[str, Any]) -> list[str]:
    """In words, every suggestion of ``file`` that allows more than the default, which tells a defect from rounding."""
    metrics = {metric.name: metric for metric in judged()}
    return [
        f"{task}: {name} {limit:g} asks for less than the default {default:g}, which tells a defect from rounding"
        for precision, tasks in file["thresholds"].items()
        for task, limits in tasks.items()
        for name, limit in limits.items()
        if (default := Thresholds.default(precision)[name]) is not None and metrics[name].missed(limit, default)
    ]


def suggested(metric: Metric, measured: TaskMetrics) -> float | None:
    """A threshold for a model that measures like this; ``None`` where there is nothing to go by."""
    worst = metric.worst(measured)
    if worst is None or metric.defaults is None or not math.isfinite(worst):
        return None
    strictest = metric.defaults["fp32"]
    limit = (metric.margin or MARGINS[last_word(metric.name)])(worst)
    limit = max(limit, strictest) if metric.better == "less" else min(limit, strictest)
    limit = _rounded(limit, metric)
    try:
        return _limit(metric.name, metric.name, limit)
    except Mismatch:  # so far off that the margin leaves the range of the metric
        return None


def _rounded(limit: float, metric: Metric) -> float:
    """To the lenient side: decibels to a tenth, others to two digits of their distance from 1."""
    if metric.unit.symbol == "dB":
        tenths = math.ceil(10 * limit - 1e-9) if metric.better == "less" else math.floor(10 * limit + 1e-9)
        return tenths / 10
    if limit >= 1:
        return limit
    step = 10.0 ** (math.floor(math.log10(1 - limit)) - 1)
    return round(1 - math.ceil((1 - limit) / step - 1e-9) * step, 9)
