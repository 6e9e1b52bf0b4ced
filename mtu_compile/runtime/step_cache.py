"""Which UNet calls of a picture are whole, and what the others take in the place of the deep part.

Deep features change slowly from step to step, so most steps need only the shallow part of the UNet, on a deep feature
that is carried on along the line through those of the last two whole calls (``mtu_compile.bundle.step_cache``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtu_compile.bundle.step_cache import StepCache
from mtu_compile.runtime.batches import COMMON, run_samples
from mtu_compile.runtime.engine import OUTPUT, Engine, TensorSpec

Array = NDArray[Any]

#: How far apart two numbers of one timestep are: samplers place them in float32 or float64.
SAME = 0.01

#: The output of a whole UNet, and the input of a shallow one: [b, C, h, w], the state that enters the last layer.
DEEP = "deep_feature"


def whole_calls(timesteps: Sequence[float] | Array, cache: StepCache | None) -> tuple[bool, ...]:
    """Of each UNet call of a trajectory, whether it is whole: the first is, and the first at or below each of the
    schedule's timesteps; all are without a cache."""
    if cache is None:
        return (True,) * len(timesteps)
    calls: list[bool] = []
    passed, lowest = 0, np.inf
    for timestep in timesteps:
        lowest = min(lowest, float(timestep))
        below = sum(lowest <= one + SAME for one in cache.whole_at)
        calls.append(below > passed or not calls)
        passed = max(passed, below)
    return tuple(calls)


class Remembered:
    """The deep features of one picture: of its last two whole calls.

    Args:
        timesteps: of all its UNet calls.
        cache: which of them are whole; all of them without.
    """

    def __init__(self, timesteps: Array, cache: StepCache | None) -> None:
        self.whole = whole_calls(timesteps, cache)
        self._timesteps = [float(one) for one in timesteps]
        self._slope = 0.0 if cache is None else cache.slope
        self._known: list[tuple[float, Array]] = []

    def keep(self, call: int, feature: Array) -> None:
        """The deep feature [b, C, h, w] of a whole call; nothing is kept where all calls are whole."""
        if not all(self.whole):
            self._known = [*self._known, (self._timesteps[call], feature)][-2:]

    def at(self, call: int) -> Array:
        """The deep feature [b, C, h, w] for a call that is not whole."""
        last, feature = self._known[-1]
        before, earlier = self._known[0]
        if before == last or not self._slope:
            return feature
        ahead = np.float32(self._slope * (self._timesteps[call] - last) / (last - before))
        carried: Array = feature + ahead * (feature - earlier)
        return carried


def predict(
    unet: Engine,
    shallow: Engine | None,
    inputs: Mapping[str, Array],
    parts: Sequence[slice],
    remembered: Sequence[Remembered],
    call: int,
) -> Array:
    """What the UNet answers [n, C, h, w] for several pictures, of which some need only the shallow part at this call.

    A picture is the same whoever it shares its calls with: those that are whole go through the whole UNet, those that
    are not through the shallow one.

    Args:
        unet: the whole UNet.
        shallow: the shallow one; not needed where all calls are whole.
        inputs: of the whole one, n samples.
        parts: of each picture, its samples.
        remembered: of each picture, its deep features.
        call: index of the call.
    """
    whole = [part for part, one in zip(parts, remembered, strict=True) if one.whole[call]]
    rest = [(part, one.at(call)) for part, one in zip(parts, remembered, strict=True) if not one.whole[call]]
    if not rest:
        answers = run_samples(unet, inputs)
        _keep(answers, parts, parts, remembered, call)
        return answers[OUTPUT]
    assert shallow is not None
    output: Array | None = None
    pieces = []
    if whole:
        answers = run_samples(unet, _rows(inputs, whole))
        _keep(answers, whole, parts, remembered, call)
        pieces.append((whole, answers[OUTPUT]))
    places = [part for part, _ in rest]
    given = _rows({name: inputs[name] for name in shallow.inputs if name != DEEP}, places)
    feature = np.concatenate([one for _, one in rest]) if len(rest) > 1 else rest[0][1]
    pieces.append((places, run_samples(shallow, {**given, DEEP: feature})[OUTPUT]))
    for members, answer in pieces:
        if output is None:
            output = np.empty((parts[-1].stop, *answer.shape[1:]), answer.dtype)
        for part, own in _split(members):
            output[part] = answer[own]
    assert output is not None
    return output


def _keep(
    answers: Mapping[str, Array],
    members: Sequence[slice],
    parts: Sequence[slice],
    remembered: Sequence[Remembered],
    call: int,
) -> None:
    if DEEP not in answers:
        return
    whose = {part.start: one for part, one in zip(parts, remembered, strict=True)}
    for part, own in _split(members):
        whose[part.start].keep(call, answers[DEEP][own])


def _split(members: Sequence[slice]) -> list[tuple[slice, slice]]:
    """Of each member, its rows among all samples, and among those of the members."""
    ends = np.cumsum([part.stop - part.start for part in members])
    return [
        (part, slice(int(end) - (part.stop - part.start), int(end))) for part, end in zip(members, ends, strict=True)
    ]


def _rows(inputs: Mapping[str, Array], members: Sequence[slice]) -> dict[str, Array]:
    """The samples of some pictures."""
    if len(members) == 1:
        return {name: one if name in COMMON else one[members[0]] for name, one in inputs.items()}
    return {
        name: one if name in COMMON else np.concatenate([one[part] for part in members]) for name, one in inputs.items()
    }


class WithoutDeepFeature:
    """A UNet that gives the deep feature, as one that does not: what it is compared with has no such output.

    Attributes:
        inputs: what has to be given, by name.
        outputs: what comes back, by name.
    """

    def __init__(self, engine: Engine) -> None:
        self.name = getattr(engine, "name", "the UNet")
        self.inputs: Mapping[str, TensorSpec] = engine.inputs
        self.outputs: Mapping[str, TensorSpec] = {key: one for key, one in engine.outputs.items() if key != DEEP}
        self._engine = engine

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see ``Engine``."""
        return {key: one for key, one in self._engine(inputs).items() if key != DEEP}

    def close(self) -> None:
        """Close the UNet."""
        self._engine.close()


def without_deep_feature(engine: Engine) -> Engine:
    """``engine``, with no output but those that every UNet has."""
    return WithoutDeepFeature(engine) if DEEP in engine.outputs else engine
