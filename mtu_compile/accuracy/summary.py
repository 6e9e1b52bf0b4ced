"""The figures of a task's metrics: at their places in a summary, why one is not there, and what is shown of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from mtu_compile.accuracy import metrics
from mtu_compile.accuracy.metric import DIRECTION, Figure, Metric, Subject, Value
from mtu_compile.accuracy.readings import Reading
from mtu_compile.accuracy.task_metrics import TaskMetrics


def summarise(measured: TaskMetrics) -> dict[str, Any]:
    """Every figure at its place, spans as [least, largest]; groups without any number are ``None``."""
    summary: dict[str, Any] = {}
    for metric in metrics.METRICS:
        readings = metric.readings(measured)
        for figure in metric.figures:
            for key, value in _values(metric, figure, readings):
                _put(summary, key.split("."), list(value) if isinstance(value, tuple) else value)
    return {key: None if _is_empty(value) else value for key, value in summary.items()}


def _values(metric: Metric, figure: Figure, readings: Sequence[Reading]) -> Iterator[tuple[str, Value | None]]:
    if DIRECTION not in figure.key:
        yield figure.key, _picked(metric, figure, readings)
        return
    directions = dict.fromkeys(str(reading.direction) for reading in readings)
    if not directions:
        yield figure.key.split(f".{DIRECTION}")[0], None
    for direction in directions:
        of_direction = [reading for reading in readings if reading.direction == direction]
        yield figure.key.replace(DIRECTION, direction), _picked(metric, figure, of_direction)


def _picked(metric: Metric, figure: Figure, readings: Sequence[Reading]) -> Value | None:
    values = [reading.value for reading in readings if reading.value is not None]
    if not values:
        return None
    if figure.pick == "span":
        return min(values), max(values)
    return fmean(values) if figure.pick == "mean" else metric.worst_of(values)


def _put(group: dict[str, Any], place: Sequence[str], value: Any) -> None:
    for name in place[:-1]:
        group = group.setdefault(name, {})
    group[place[-1]] = value


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and all(entry is None for entry in value.values())


def absent_reasons(subject: Subject) -> tuple[dict[str, str], frozenset[str]]:
    """Why there is no figure: (its key, or its group's) → the reason; and the names of the metrics without a judgement.

    A metric that applies and was not measured for no such reason is left out, and so fails its threshold.
    """
    reasons, absent = {}, set()
    for metric in metrics.METRICS:
        if (reason := metric.absent(subject, metric.worst(subject.measured))) is not None:
            absent.add(metric.name)
            reasons[metric.figures[0].key.partition(".")[0]] = reason
    return reasons, frozenset(absent)


def columns() -> dict[str, tuple[Figure, ...]]:
    """The columns of the command's table: heading → what stands in it."""
    shown: dict[str, tuple[Figure, ...]] = {}
    for figure in (figure for metric in metrics.METRICS for figure in metric.figures if figure.column):
        shown[figure.column] = (*shown.get(figure.column, ()), figure)
    return shown


def is_group(key: str) -> bool:
    """Whether figures lie below ``key`` in a summary, which is ``None`` where they do not apply."""
    return any(figure.key.startswith(f"{key}.") for metric in metrics.METRICS for figure in metric.figures)


def figure_of(key: str) -> tuple[Metric, Figure] | None:
    """The figure whose place in a summary is ``key``."""
    every = ((metric, figure) for metric in metrics.METRICS for figure in metric.figures)
    return next((one for one in every if one[1].fits(key) is not None), None)
