"""How much each layer's INT8 costs in accuracy: the error of the UNet's output when only this layer is quantised.

Errors of single layers are small and independent, so their powers add up: on the emoji example the sum of the single
errors is within a decibel of the error of all layers together. That is what makes it possible to choose by them.

They are estimated for all layers at once (``estimate``). Where the sum of what is estimated turns out not to be what
a choice of layers does, single layers are run (``measure``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.layer_groups import LayerGroup
from calibration.switched_graph import SwitchedGraph
from mtu_compile.accuracy.calls import StepMetrics, step_metrics
from mtu_compile.accuracy.formulas import decibels
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.guidance import DIRECTIONS, ROWS, Guidance
from mtu_compile.runtime.engine import OUTPUT

Feed = Mapping[str, NDArray[Any]]
Array = NDArray[np.float64]

#: Less than any signal.
_NOTHING = 1e-30


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

    def compare(self, output: NDArray[Any], guidance: Guidance) -> StepMetrics:
        """What another answer to it is worth."""
        return step_metrics({OUTPUT: self.output}, {OUTPUT: output}, timestep=self.timestep, guidance=guidance)


@dataclass(frozen=True)
class Sensitivity:
    """Errors of each group on its own, as shares of the signal.

    Attributes:
        groups: what is switched to INT8.
        noise: [groups, calls] Σ error² / Σ output² of the UNet's output.
        guidance_noise: [groups, calls, directions] the same of each guidance delta; no directions without guidance.
        measured: [groups, calls] where the group was run in INT8; elsewhere it is an estimate.
    """

    groups: tuple[LayerGroup, ...]
    noise: Array
    guidance_noise: Array
    measured: NDArray[np.bool_]

    @property
    def unknown(self) -> list[int]:
        """Groups of which there is not even an estimate."""
        return [int(number) for number in np.flatnonzero(np.isnan(self.noise).any(axis=1))]

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


def estimate(
    graph: SwitchedGraph,
    calls: Sequence[Call],
    *,
    guidance: Guidance,
    probes: int,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """What each group in INT8 does, to the first order (``calibration.first_order``).

    Each is a mean of ``probes`` squares of normal numbers for every sample: of 8 probes and 2 samples, within 1.5 dB
    two times of three. nan where there is no estimate.

    Args:
        graph: a task's float graph with its INT8 twin.
        calls: what the float graph answers, see ``answers``.
        guidance: the task's kind of guidance.
        probes: more are more exact; each takes a pass backward.
        progress: called with 1 after each call.

    Raises:
        CalibrationError: no calls.
    """
    if not calls:
        raise CalibrationError("there are no inputs to measure layers with")
    count, directions = len(graph.groups), DIRECTIONS[guidance]
    noise = np.full((count, len(calls)), np.nan)
    deltas = np.full((count, len(calls), len(directions)), np.nan)
    errors = graph.errors((call.inputs for call in calls), probes) if graph.derivable else iter(())
    for place, (call, found) in enumerate(zip(calls, errors, strict=False)):
        output = call.output.astype(np.float64)
        noise[:, place] = np.square(found).sum(axis=2).mean(axis=0) / max(float(np.square(output).sum()), _NOTHING)
        rows = len(ROWS[guidance])
        by_row = found.reshape(*found.shape[:2], rows, -1)
        of_row = output.reshape(rows, -1)
        for i, direction in enumerate(directions):
            energy = float(np.square(of_row[direction.end] - of_row[direction.start]).sum())
            error = np.square(by_row[:, :, direction.end] - by_row[:, :, direction.start]).sum(axis=2).mean(axis=0)
            deltas[:, place, i] = error / energy if energy else 0.0
        if progress is not None:
            progress(1)
    return Sensitivity(graph.groups, noise, deltas, np.zeros(noise.shape, np.bool_))


def measure(
    graph: SwitchedGraph, call: Call, numbers: Sequence[int], *, guidance: Guidance
) -> Iterator[tuple[float, list[float]]]:
    """Switch the groups of these ``numbers`` to INT8 one by one: ``noise`` and ``guidance_noise`` of each."""
    for output in graph.run_each(call.inputs, numbers):
        yield noise_of(call.compare(output, guidance))


def measure_again(
    known: Sensitivity, graph: SwitchedGraph, calls: Sequence[Call], numbers: Sequence[int], *, guidance: Guidance
) -> None:
    """Put what ``measure`` finds of these groups into the place of what is ``known`` of them; of none, nothing is run.

    Args:
        calls: those that ``known`` is of.
    """
    for place, call in enumerate(calls if len(numbers) else ()):
        for number, (noise, deltas) in zip(numbers, measure(graph, call, numbers, guidance=guidance), strict=True):
            known.noise[number, place], known.guidance_noise[number, place] = noise, deltas
            known.measured[number, place] = True


def noise_of(step: StepMetrics) -> tuple[float, list[float]]:
    """Errors of a call as shares of the signal: of the output, and of each guidance delta."""
    deltas = [delta.error_energy / delta.energy if delta.energy else 0.0 for delta in step.guidance]
    return 10 ** (-step.sqnr_db / 10), deltas


def compare_calls(
    graph: SwitchedGraph, calls: Sequence[Call], int8: Collection[str], *, guidance: Guidance
) -> tuple[StepMetrics, ...]:
    """Every call with the groups named in ``int8`` quantised, against the float graph."""
    outputs = graph.run_all([call.inputs for call in calls], int8)
    return tuple(call.compare(output, guidance) for call, output in zip(calls, outputs, strict=True))


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
