"""How much each layer's INT8 costs in accuracy: the error of the UNet's output when only this layer is quantised.

Errors of single layers are small and independent, so their powers add up: on the emoji example the sum of the single
errors is within a decibel of the error of all layers together. That is what makes it possible to choose by them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.layer_groups import LayerGroup
from calibration.switched_graph import SwitchedGraph
from mtu_compile.accuracy.calls import StepMetrics, step_metrics
from mtu_compile.accuracy.formulas import decibels
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.guidance import Guidance
from mtu_compile.runtime.engine import OUTPUT

Feed = Mapping[str, NDArray[Any]]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Call:
    """A UNet call.

    Attributes:
        inputs: an array for each input of the graph.
        output: what the float graph answers.
    """

    inputs: Feed
    output: NDArray[Any]

    @property
    def timestep(self) -> float:
        return timestep(self.inputs)


@dataclass(frozen=True)
class Sensitivity:
    """Errors of each group on its own, as shares of the signal.

    Attributes:
        groups: what was switched to INT8, one after the other.
        noise: [groups, calls] Σ error² / Σ output² of the UNet's output.
        guidance_noise: [groups, calls, directions] the same of each guidance delta; no directions without guidance.
    """

    groups: tuple[LayerGroup, ...]
    noise: Array
    guidance_noise: Array

    def sqnr_db(self, index: int) -> float:
        """Of the UNet's output when only group ``index`` is INT8, pooled over the calls, decibels."""
        return decibels(1.0, float(self.noise[index].mean()))

    def worst_sqnr_db(self, index: int) -> float:
        """The same of the worst call."""
        return decibels(1.0, float(self.noise[index].max()))

    def guidance_db(self, index: int) -> float | None:
        """SQNR of the guidance delta of the worst direction, pooled over the calls; ``None`` without guidance."""
        if not self.guidance_noise.shape[2]:
            return None
        return decibels(1.0, float(self.guidance_noise[index].mean(axis=0).max()))


def measure(
    graph: SwitchedGraph,
    calls: Sequence[Call],
    *,
    guidance: Guidance,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Switch one group after the other to INT8.

    Args:
        graph: a task's float graph with its INT8 twin.
        calls: what the float graph answers, see ``answers``.
        guidance: the task's kind of guidance.
        progress: called with 1 after each run.

    Raises:
        CalibrationError: no calls.
    """
    if not calls:
        raise CalibrationError("there are no inputs to measure layers with")
    noise, deltas = [], []
    for call in calls:
        for output in graph.run_each(call.inputs):
            step = _compare(call, output, guidance)
            noise.append(10 ** (-step.sqnr_db / 10))
            deltas.append([delta.error_energy / delta.energy if delta.energy else 0.0 for delta in step.guidance])
            if progress is not None:
                progress(1)
    shape = (len(calls), len(graph.groups))
    directions = len(deltas[0])
    return Sensitivity(
        graph.groups,
        np.array(noise).reshape(shape).T,
        np.array(deltas).reshape(*shape, directions).transpose(1, 0, 2),
    )


def compare_calls(
    graph: SwitchedGraph, calls: Sequence[Call], int8: Collection[str], *, guidance: Guidance
) -> tuple[StepMetrics, ...]:
    """Every call with the groups named in ``int8`` quantised, against the float graph."""
    outputs = graph.run_all([call.inputs for call in calls], int8)
    return tuple(_compare(call, output, guidance) for call, output in zip(calls, outputs, strict=True))


def answers(graph: SwitchedGraph, inputs: Sequence[Feed]) -> tuple[Call, ...]:
    """Run the float graph on ``inputs``, e.g. those of a calibration set."""
    return tuple(Call(feed, output) for feed, output in zip(inputs, graph.run_all(inputs), strict=True))


def evenly_spread(timesteps: Sequence[float], count: int) -> list[int]:
    """Places of ``count`` of ``timesteps`` that differ as much as they can, in order; of equal ones those far apart."""
    if count >= len(timesteps):
        return list(range(len(timesteps)))
    order = sorted(range(len(timesteps)), key=lambda i: (-timesteps[i], i))
    return sorted({order[i] for i in np.linspace(0, len(order) - 1, count).round().astype(int)})


def timestep(inputs: Feed) -> float:
    """Of a UNet call; 0 for a graph that has no such input."""
    return float(np.ravel(inputs["timestep"])[0]) if "timestep" in inputs else 0.0


def _compare(call: Call, output: NDArray[Any], guidance: Guidance) -> StepMetrics:
    return step_metrics({OUTPUT: call.output}, {OUTPUT: output}, timestep=call.timestep, guidance=guidance)
