"""Recorded UNet calls: what a candidate answers to the inputs of the float original, against what that answered.

The one loop that does so, on build machines and on boards. A candidate that takes other inputs or gives other outputs
than were recorded is refused, and so is what is not finite: nothing is fed by position, cast, or compared in part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mtu_compile.accuracy.calls import Feed, StepMetrics, step_metrics
from mtu_compile.core.errors import AccuracyError
from mtu_compile.core.guidance import Guidance
from mtu_compile.runtime.engine import OUTPUT, Array, TensorSpec
from mtu_compile.runtime.reference import Reference, Trajectory


@dataclass(frozen=True)
class RecordedCall:
    """A UNet call of the float original.

    Attributes:
        inputs: by name, an array for each input of the static graph.
        outputs: by name, what it answered.
        timestep: the scheduler's, or ``None`` if the recording has none.
    """

    inputs: Feed
    outputs: Feed
    timestep: float | None


class Candidate(Protocol):
    """What is compared: an engine, or anything that says what it takes and can be called."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]: ...


def calls_of(trajectory: Trajectory) -> Iterator[RecordedCall]:
    """Every UNet call of one recorded picture."""
    for inputs, output, timestep in zip(trajectory.inputs, trajectory.outputs, trajectory.timesteps, strict=True):
        yield RecordedCall(inputs, {OUTPUT: output}, timestep)


def some_calls(reference: Reference, most: int) -> list[RecordedCall]:
    """Up to ``most`` UNet calls of a reference, spread evenly over all of its trajectories."""
    return [RecordedCall(inputs, {OUTPUT: output}, timestep) for inputs, output, timestep in reference.calls(most)]


def compare_recorded(
    candidate: Candidate,
    calls: Sequence[RecordedCall],
    *,
    guidance: Guidance = "none",
    name: str = "candidate",
    told: Callable[[Mapping[str, Array]], None] | None = None,
) -> tuple[StepMetrics, ...]:
    """Run a candidate on recorded inputs, and compare what it answers with the recorded outputs.

    Args:
        candidate: see ``Candidate``.
        calls: in the order they are run.
        guidance: the task's kind of guidance, which says what the samples of a batch are: ``"text"`` [without, with
            prompt], ``"text+image"`` [without both, with image, with both].
        name: what the candidate is called in messages.
        told: called with each answer.

    Raises:
        AccuracyError: there are no calls; inputs that the candidate does not take, or takes in another shape; outputs
            that are missing, too many, of another shape, empty, or not finite, in the recording too.
    """
    if not calls:
        raise AccuracyError(f"{name} would run zero iterations", hint="the recorded inputs are empty")
    measured = []
    for index, call in enumerate(calls):
        _check_inputs(candidate, call.inputs, index)
        if not call.outputs:
            raise AccuracyError(f"reference has no outputs in iteration {index}")
        _check_outputs("reference", call.outputs, call.outputs, index)
        answer = candidate(call.inputs)
        _check_outputs(name, answer, call.outputs, index)
        if told is not None:
            told(answer)
        measured.append(step_metrics(call.outputs, answer, timestep=call.timestep, guidance=guidance))
    return tuple(measured)


def _check_inputs(candidate: Candidate, feed: Feed, index: int) -> None:
    if differing := sorted(feed.keys() ^ candidate.inputs.keys()):
        side = "recording" if differing[0] in feed else "candidate"
        raise AccuracyError(f"only the {side} has an input {differing[0]!r}")
    for name, array in feed.items():
        wanted = candidate.inputs[name].shape
        fits = len(wanted) == array.ndim and all(w in (None, n) for w, n in zip(wanted, array.shape, strict=True))
        if not fits:
            shapes = f"{array.shape} was recorded in call {index}, the candidate takes {wanted}"
            raise AccuracyError(f"input {name!r}: shape {shapes}")


def _check_outputs(name: str, outputs: Feed, expected: Feed, index: int) -> None:
    if missing := sorted(expected.keys() - outputs.keys()):
        raise AccuracyError(f"{name} has no output {missing[0]!r} in iteration {index}; it has {sorted(outputs)}")
    if extra := sorted(outputs.keys() - expected.keys()):
        raise AccuracyError(f"{name} has an output {extra[0]!r} that reference has not, in iteration {index}")
    for output, array in outputs.items():
        if array.shape != expected[output].shape:
            shapes = f"{tuple(array.shape)}, not {tuple(expected[output].shape)}"
            raise AccuracyError(f"{name}: output {output!r} has shape {shapes}, in iteration {index}")
        if array.size == 0:
            raise AccuracyError(f"{name}: output {output!r} is empty, in iteration {index}")
        if bad := int(np.count_nonzero(~np.isfinite(np.asarray(array, dtype=np.float64)))):
            raise AccuracyError(f"{name}: output {output!r} has {bad} NaN or Inf values, in iteration {index}")
