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

from calibration.switches import SwitchedGraph, Unit
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.tasks import Guidance
from mtu_compile.metrics import StepMetrics, decibels, step_metrics

Feed = Mapping[str, NDArray[Any]]
Array = NDArray[np.float64]

#: The UNet's output, as step metrics name it.
OUTPUT = "out_sample"


@dataclass(frozen=True)
class Sensitivity:
    """Errors of each unit on its own, as shares of the signal.

    Attributes:
        units: what was switched to INT8, one after the other.
        timesteps: of each UNet call.
        noise: [units, calls] Σ error² / Σ output² of the UNet's output.
        guidance_noise: [units, calls, directions] the same of each guidance delta; no directions without guidance.
    """

    units: tuple[Unit, ...]
    timesteps: tuple[float, ...]
    noise: Array
    guidance_noise: Array

    def sqnr_db(self, index: int) -> float:
        """Of the UNet's output when only unit ``index`` is INT8, pooled over the calls, decibels."""
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
    calls: Sequence[Feed],
    *,
    guidance: Guidance,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Switch one unit after the other to INT8.

    Args:
        graph: a task's float graph with its INT8 twin.
        calls: inputs of the UNet, e.g. of a calibration set; the float graph's own outputs are the reference.
        guidance: the task's kind of guidance.
        progress: called with 1 after each run.

    Raises:
        CalibrationError: no calls.
    """
    if not calls:
        raise CalibrationError("there are no inputs to measure layers with")
    noise, deltas = [], []
    for feed in calls:
        wanted = graph.run(feed)
        for unit in graph.units:
            step = _compare(wanted, graph.run(feed, (unit.name,)), feed, guidance)
            noise.append(10 ** (-step.sqnr_db / 10))
            deltas.append([one.error_energy / one.energy if one.energy else 0.0 for one in step.guidance])
            if progress is not None:
                progress(1)
    shape = (len(calls), len(graph.units))
    directions = len(deltas[0])
    return Sensitivity(
        graph.units,
        tuple(_timestep(feed) for feed in calls),
        np.array(noise).reshape(shape).T,
        np.array(deltas).reshape(*shape, directions).transpose(1, 0, 2),
    )


def compare(
    graph: SwitchedGraph, calls: Sequence[Feed], int8: Collection[str], *, guidance: Guidance
) -> tuple[StepMetrics, ...]:
    """Every call with the units named in ``int8`` quantised, against the float graph."""
    return tuple(_compare(graph.run(feed), graph.run(feed, int8), feed, guidance) for feed in calls)


def spread(calls: Sequence[Feed], count: int) -> list[Feed]:
    """``count`` of ``calls`` that differ in timestep as much as they can; of equal ones those of other pictures."""
    if count >= len(calls):
        return list(calls)
    order = sorted(range(len(calls)), key=lambda i: (-_timestep(calls[i]), i))
    picked = {order[i] for i in np.linspace(0, len(order) - 1, count).round().astype(int)}
    return [calls[i] for i in sorted(picked)]


def _compare(wanted: NDArray[Any], found: NDArray[Any], feed: Feed, guidance: Guidance) -> StepMetrics:
    return step_metrics({OUTPUT: wanted}, {OUTPUT: found}, timestep=_timestep(feed), guidance=guidance)


def _timestep(feed: Feed) -> float:
    return float(np.ravel(feed["timestep"])[0]) if "timestep" in feed else 0.0
