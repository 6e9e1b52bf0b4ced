"""Factors for each task's inputs of layers, so that one INT8 scale serves all tasks and costs none of them bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.quant_settings import QuantSettings
from calibration.ranges import ActivationRange, measure_cases
from mtu_compile.core.errors import CalibrationError, ConfigError

Feed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class AlignSettings:
    """Where factors go.

    Attributes:
        limit_bits: a layer gets factors where the shared scale would cost some task more than this, of its 8 bits.
        powers_of_two: round the factors, so that the float graph's results stay the same to the bit.
    """

    limit_bits: float = 0.5
    powers_of_two: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit_bits) and self.limit_bits >= 0):
            raise ConfigError(f"a limit of bits is a number from 0 up, not {self.limit_bits}")


@dataclass(frozen=True)
class AlignedLayer:
    """What a layer's scale costs each task.

    Attributes:
        factors: what the layer's input is multiplied by, and its output divided by.
        before, after: bits that the task would lose to the scale of the largest without factors, and with them.
    """

    factors: Mapping[str, float]
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True)
class AlignReport:
    """What became of a graph.

    Attributes:
        settings: what was asked for.
        layers: those that were aligned, by name.
        left: layers that cost some task more than the limit and could not be aligned, and why.
        measured: layers that were looked at.
        worst_before, worst_after: by task, the most bits it loses in any layer.
    """

    settings: AlignSettings
    layers: Mapping[str, AlignedLayer]
    left: Mapping[str, str]
    measured: int
    worst_before: Mapping[str, float]
    worst_after: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def align(
    graph: Path,
    out: Path,
    inputs_by_task: Mapping[str, Sequence[Feed]],
    settings: AlignSettings | None = None,
    *,
    quantisation: QuantSettings | None = None,
    progress: Callable[[int], None] | None = None,
) -> AlignReport:
    """Measure what each task's activations of the shared float graph are like, and align those that differ.

    Args:
        graph: ONNX file with an input ``task``, static but perhaps for its batch; float32.
        out: ONNX file to write: the same function for every task, to float rounding. It is written even if nothing is
            to be aligned.
        inputs_by_task: by task, inputs of the graph (as ``calibration.merged.MergedSet.of_task`` gives them), each of
            that task alone.
        settings: the defaults of ``AlignSettings`` if not given.
        quantisation: how the graph will be quantised: which layers, and what their ranges are taken from.
        progress: called with 1 for each of the inputs.

    Raises:
        CalibrationError: no tasks or no inputs, inputs that mix tasks or do not fit the graph.
        ConfigError: an ignored scope matches nothing.
        ModelError: the graph is unreadable.
        PassError: the graph has no input ``task``.
    """
    from passes import Alignment, PassContext, run_pipeline
    from passes.align_ranges import AlignRanges

    settings, quantisation = settings or AlignSettings(), quantisation or QuantSettings()
    rows = {task: _row(task, inputs) for task, inputs in inputs_by_task.items()}
    if not rows:
        raise CalibrationError("there are no tasks to align")
    measured = measure_cases(graph, inputs_by_task, ignored_scopes=quantisation.ignored_scopes, progress=progress)
    ranges = {task: _ranges(found, quantisation) for task, found in measured.items()}
    lost = lost_bits(ranges)
    costly = {name: factors_of(bits, settings) for name, bits in lost.items()}
    costly = {name: factors for name, factors in costly.items() if any(one != 1 for one in factors.values())}
    total = _count_tasks(graph, rows)
    factors = {name: _by_row(found, rows, total) for name, found in costly.items()}
    context = PassContext(alignment=Alignment(factors))
    (done,) = run_pipeline(graph, out, [AlignRanges.id], context)
    left = {one.node: one.reason for one in done.skipped}
    after = {name: _after(bits, costly[name]) if name in costly.keys() - left else bits for name, bits in lost.items()}
    aligned = {name: AlignedLayer(found, lost[name], after[name]) for name, found in costly.items() if name not in left}
    return AlignReport(settings, aligned, left, len(lost), _worst(lost, rows), _worst(after, rows))


def lost_bits(ranges: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """By layer and task, bits lost to the scale of the task with the largest range: log2(largest / own).

    A task in which a layer sees nothing but zeros loses nothing there.

    Args:
        ranges: by task and layer.
    """
    lost = {}
    for layer in dict.fromkeys(layer for sizes in ranges.values() for layer in sizes):
        own = {task: sizes.get(layer, 0.0) for task, sizes in ranges.items()}
        largest = max(own.values())
        lost[layer] = {task: math.log2(largest / size) if size > 0 else 0.0 for task, size in own.items()}
    return lost


def factors_of(lost: Mapping[str, float], settings: AlignSettings) -> dict[str, float]:
    """By task, what brings its range to that of the largest; 1 for all where nobody loses more than the limit."""
    if max(lost.values()) <= settings.limit_bits:
        return dict.fromkeys(lost, 1.0)
    return {task: 2.0 ** (round(bits) if settings.powers_of_two else bits) for task, bits in lost.items()}


def _row(task: str, inputs: Sequence[Feed]) -> int:
    """The row of the graph's tables that all inputs of a task select."""
    if not inputs:
        raise CalibrationError(f"there are no inputs of task {task!r} to align the layers' ranges with")
    rows = {int(row) for feed in inputs for row in np.ravel(feed["task"])}
    if len(rows) != 1:
        raise CalibrationError(f"the inputs of task {task!r} are not of one task: rows {sorted(rows)}")
    return rows.pop()


def _ranges(measured: Mapping[str, ActivationRange], quantisation: QuantSettings) -> dict[str, float]:
    histogram = quantisation.range_estimator == "histogram"
    return {layer: one.int8 if histogram else one.absmax for layer, one in measured.items()}


def _count_tasks(graph: Path, rows: Mapping[str, int]) -> int:
    from mtu_compile.graph import io as graph_io
    from passes.align_ranges import count_rows

    return max(count_rows(graph_io.load(graph)), max(rows.values()) + 1)


def _by_row(factors: Mapping[str, float], rows: Mapping[str, int], total: int) -> tuple[float, ...]:
    """As a table; tasks nobody gave inputs of keep what they have."""
    by_row = {rows[task]: factor for task, factor in factors.items()}
    return tuple(by_row.get(row, 1.0) for row in range(total))


def _after(lost: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    """Bits lost with factors: ranges are then largest · 2^-lost · factor."""
    left = {task: bits - math.log2(factors[task]) for task, bits in lost.items()}
    least = min(left.values())
    return {task: bits - least for task, bits in left.items()}


def _worst(layers: Mapping[str, Mapping[str, float]], tasks: Mapping[str, int]) -> dict[str, float]:
    return {task: max((lost[task] for lost in layers.values()), default=0.0) for task in tasks}
