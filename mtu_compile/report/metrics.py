"""A task's table of metrics, from the numbers of its check: whatever numbers there are, with names for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mtu_compile.accuracy.metrics import GROUPS
from mtu_compile.accuracy.summary import figure_of, is_group
from mtu_compile.accuracy.thresholds import Thresholds
from mtu_compile.bundle.units import unit_of
from mtu_compile.report.data import Bounds, MetricLine, Value

#: Entries of a summary that are no metrics.
NOT_METRICS = frozenset({"pictures", "passed", "thresholds", "reasons", "measured_with"})


def metric_lines(
    summary: Mapping[str, Any], recorded: Mapping[str, Any] | None, thresholds: Thresholds
) -> tuple[MetricLine, ...]:
    """Every number of ``summary`` (``TaskCheck.summary``), beside the one ``recorded`` at the build."""
    before = dict(_flat(recorded or {}))
    reasons = summary.get("reasons", {})
    return tuple(
        MetricLine(
            key=key,
            label=label(key),
            unit=symbol(key),
            value=value,
            recorded=before.get(key),
            bounds=bounds(key, thresholds.limits),
            reason=None if value is not None else reasons.get(key, "not measured"),
        )
        for key, value in _flat(summary)
    )


def label(key: str) -> str:
    """What a number of a summary is called in the report; one that no metric shows is called by its key."""
    known = figure_of(key)
    if known is None:
        return GROUPS.get(key, key.replace(".", ", ").removesuffix("_db").replace("_", " "))
    return str(known[1].fits(key))


def symbol(key: str) -> str:
    """The unit behind a number."""
    unit = unit_of(key)
    return "" if unit is None else unit.symbol


def bounds(key: str, limits: Mapping[str, Any]) -> Bounds | None:
    """What a number has to be within, by thresholds of its metric's name; ``None`` where none is set for it."""
    known = figure_of(key)
    if known is None or not known[1].judged or not _is_number(limits.get(known[0].name)):
        return None
    return known[0].bounds(limits[known[0].name])


def _flat(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Value | None]]:
    """(dotted key, value) of the numbers, pairs of numbers and ``None`` in ``summary``."""
    for key, value in summary.items():
        if not prefix and (key in NOT_METRICS or key.endswith("_reason") or (value is None and is_group(key))):
            continue
        if key == "thresholds":
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is None or _is_number(value):
            yield prefix + key, None if value is None else float(value)
        elif isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_number, value)):
            yield prefix + key, (float(value[0]), float(value[1]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
