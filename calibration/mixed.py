"""Mixed precision by measurement: the fewest, cheapest layers that stay float so that a task keeps its accuracy.

1. Layers that the device runs slower in INT8 than in float stay float.
2. Each layer's error, when only it is INT8, is measured on calibration inputs (``calibration.sensitivity``).
3. Errors add up, so the error of any choice is known without running it. As long as a UNet call misses the criteria,
   the layer whose INT8 does most of the damage for its gain in time becomes float; layers that turn out not to be
   needed are given back.
4. The choice is run as a whole. If it misses the criteria after all, the search goes on with stricter ones.

Float layers cost time. The search stops where the network would become slower than ``Criteria.slowdown`` allows, and
says so: whether a task is good enough is not decided here, but by its thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from calibration.sensitivity import Call, Feed, Sensitivity, answers, compare, measure, spread, timestep
from calibration.switches import SwitchedGraph
from mtu_compile.accuracy.metrics import StepMetrics
from mtu_compile.core.guidance import Guidance
from targets.costs.layers import ComparedCosts

#: Networks with more weights than this are measured less: a run of the emoji example takes 20 ms, one of Stable
#: Diffusion 1.5 two seconds, and there are hundreds.
LARGE = 200_000_000

#: Where the whole choice misses what its parts promised, the parts have to promise this much more.
_STRICTER = 0.8
_ROUNDS = 8

Array = NDArray[np.float64]
Why = Literal["accuracy", "slower"]

#: Fields of a layer that are numbers where they are not ``None``; infinity comes from a manifest as a word.
_NUMBERS = ("sqnr_db", "worst_sqnr_db", "guidance_db", "float_ms", "int8_ms")


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        calls: UNet calls each layer is measured on.
        check_calls: calls a whole choice is run on.
        rounds: inferences the layers are timed over.
        parallel: whether inferences that are not timed run beside each other, see ``SwitchedGraph``.
    """

    calls: int = 8
    check_calls: int = 40
    rounds: int = 96
    parallel: bool = True

    @classmethod
    def of(cls, weights: int) -> Effort:
        """What a network of so many weights is worth."""
        return cls() if weights <= LARGE else cls(calls=2, check_calls=10, rounds=24, parallel=False)


@dataclass(frozen=True)
class Criteria:
    """What a choice has to keep, at every UNet call. Pictures nobody has seen yet want a margin to what is aimed at.

    Attributes:
        sqnr_db: least SQNR of the UNet's output, decibels.
        guidance_ratio: a guidance delta's norm may shrink to this and grow to its inverse.
        slowdown: how much slower than all of it in INT8 the network may become for accuracy's sake, 0.1 for 10 %.
    """

    sqnr_db: float = 26.0
    guidance_ratio: float = 0.98
    slowdown: float = 0.1

    def met_by(self, steps: Sequence[StepMetrics]) -> bool:
        """Whether every one of ``steps`` is accurate enough."""
        return all(
            step.sqnr_db >= self.sqnr_db
            and all(self.guidance_ratio <= delta.ratio <= 1 / self.guidance_ratio for delta in step.guidance)
            for step in steps
        )


@dataclass(frozen=True)
class LayerChoice:
    """One unit of layers that are quantised together.

    Attributes:
        name, members, op: see ``calibration.switches.Unit``.
        sqnr_db, worst_sqnr_db: of the UNet's output when only these are INT8: pooled over the calls, the worst call.
        guidance_db: of the guidance delta, pooled, in the worst direction; ``None`` without guidance.
        float_ms, int8_ms: what they cost on the device, ``None`` where nothing is known.
        kept: why they stay float, or ``None`` where they are INT8.
    """

    name: str
    members: tuple[str, ...]
    op: str
    sqnr_db: float
    worst_sqnr_db: float
    guidance_db: float | None
    float_ms: float | None
    int8_ms: float | None
    kept: Why | None

    @property
    def gain_ms(self) -> float | None:
        """Milliseconds that INT8 saves."""
        return None if self.float_ms is None or self.int8_ms is None else self.float_ms - self.int8_ms

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerChoice:
        """From a manifest."""
        decibels = {key: None if data[key] is None else float(data[key]) for key in _NUMBERS}
        return cls(**{**data, **decibels, "members": tuple(map(str, data["members"]))})


@dataclass(frozen=True)
class MixedPrecision:
    """What was chosen, and everything it was chosen by.

    Attributes:
        criteria: what had to be met.
        met: whether the choice, run as a whole, meets them.
        calls: UNet calls each layer was measured on.
        check_calls: UNet calls the whole was run on.
        layers: every unit, in graph order.
        costs: where the times come from, and whether they were measured on the device.
        all_int8: accuracy with everything in INT8.
        chosen: accuracy of the choice.
    """

    criteria: Criteria
    met: bool
    calls: int
    check_calls: int
    layers: tuple[LayerChoice, ...]
    costs: Mapping[str, Any] | None
    all_int8: Mapping[str, Any]
    chosen: Mapping[str, Any]

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Node names of the layers that stay float."""
        return tuple(name for layer in self.layers if layer.kept for name in layer.members)

    @property
    def kept(self) -> tuple[LayerChoice, ...]:
        """The units that stay float, most sensitive first."""
        return tuple(sorted((one for one in self.layers if one.kept), key=lambda one: one.sqnr_db))

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "layers": [{**asdict(one), "members": list(one.members)} for one in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MixedPrecision:
        """The inverse of ``to_json``; ``KeyError``, ``TypeError`` or ``ValueError`` for what is none."""
        layers = tuple(LayerChoice.from_json(one) for one in data["layers"])
        return cls(**{**data, "layers": layers, "criteria": Criteria(**data["criteria"])})


def choose(
    graph: SwitchedGraph,
    inputs: Sequence[Feed],
    *,
    guidance: Guidance,
    effort: Effort | None = None,
    costs: ComparedCosts | None = None,
    criteria: Criteria | None = None,
    progress: Callable[[int], None] | None = None,
) -> MixedPrecision:
    """Choose the layers of one task's UNet that stay float.

    Args:
        graph: the float graph with its INT8 twin, quantised as the device will run it.
        inputs: of the UNet, the task's calibration set; a few of them are used, the same every time.
        guidance: the task's kind of guidance.
        effort: how much is measured; what a small network is worth if not given.
        costs: what the layers cost on the device.
        criteria: what to keep; the defaults of ``Criteria`` if not given.
        progress: called with 1 after each unit's run on each call it is measured on.
    """
    criteria, effort = criteria or Criteria(), effort or Effort()
    timesteps = [timestep(one) for one in inputs]
    calls = answers(graph, [inputs[i] for i in spread(timesteps, effort.check_calls)])
    names = [unit.name for unit in graph.units]

    def run(kept: set[int]) -> tuple[StepMetrics, ...]:
        return compare(graph, calls, [n for i, n in enumerate(names) if i not in kept], guidance=guidance)

    all_int8 = run(set())
    measured_on = _telling(calls, all_int8, criteria, effort.calls)
    sensitivity = measure(graph, measured_on, guidance=guidance, progress=progress)
    search = _Search(sensitivity, _loads(sensitivity, criteria), costs, criteria)
    found = run(search.kept) if search.kept else all_int8
    limit = 1.0
    for _ in range(_ROUNDS):
        if criteria.met_by(found):
            break
        before = set(search.kept)
        affordable = search.reduce(limit)
        if search.kept != before:
            found = run(search.kept)
        elif not affordable:
            break
        limit *= _STRICTER
    if search.accuracy and criteria.met_by(found):
        needed, smaller = set(search.kept), search.pruned(limit / _STRICTER)
        if smaller != needed and criteria.met_by(again := run(smaller)):
            search.kept, found = smaller, again
    layers = tuple(_layer(sensitivity, i, search) for i in range(len(names)))
    return MixedPrecision(
        criteria=criteria,
        met=criteria.met_by(found),
        calls=len(measured_on),
        check_calls=len(calls),
        layers=layers,
        costs=None if costs is None else {"source": costs.source, "measured": costs.measured},
        all_int8=_accuracy(all_int8),
        chosen=_accuracy(found),
    )


def to_blame(record: Mapping[str, Any] | None, count: int = 3) -> str:
    """In words, the INT8 layers of a recorded choice (``MixedPrecision.to_json``) that cost the most accuracy."""
    layers = [one for one in (record or {}).get("layers", ()) if one["kept"] is None]
    worst = sorted(layers, key=lambda one: float(one["sqnr_db"]))[:count]
    return ", ".join(f"{one['name']} ({one['sqnr_db']:.1f} dB alone)" for one in worst)


class _Search:
    """Which units stay float; starts with those the device runs slower in INT8."""

    def __init__(self, sensitivity: Sensitivity, loads: Array, costs: ComparedCosts | None, criteria: Criteria) -> None:
        units = sensitivity.units
        self._loads = loads
        self.times: list[tuple[float, float] | None] = [None] * len(units)
        # Where nothing is known about time, all layers are equally dear, and only so many may be float.
        self._price = np.ones(len(units))
        self._budget = criteria.slowdown * len(units)
        self.slower: set[int] = set()
        if costs is not None:
            by_layer = costs.layers
            times = [tuple(sum(by_layer[name][k] for name in unit.members) for k in (0, 1)) for unit in units]
            self.times = [(in_float, quantised) for in_float, quantised in times]
            self._budget = costs.int8_costs.total_ms * (1 / (1 - criteria.slowdown) - 1)
            gains = np.array([in_float - quantised for in_float, quantised in times])
            self._price = np.maximum(gains, max(float(np.abs(gains).mean()) * 0.01, 1e-9))
            groups = {unit.members for unit in units}
            if costs.measured:
                slower = set(costs.slower(groups))
                self.slower = {i for i, unit in enumerate(units) if unit.members in slower}
        self.kept: set[int] = set(self.slower)

    @property
    def accuracy(self) -> set[int]:
        """Units that are float for accuracy."""
        return self.kept - self.slower

    def reduce(self, limit: float) -> bool:
        """Make units float until no load is above ``limit``; ``False`` if the budget is spent before."""
        while True:
            totals = self._totals(self.kept)
            over = totals > limit
            if not over.any():
                return True
            spent = sum(self._price[i] for i in self.accuracy)
            candidates = [
                i
                for i in range(len(self._price))
                if i not in self.kept and spent + self._price[i] <= self._budget and self._loads[i][over].any()
            ]
            if not candidates:
                return False
            relief = {i: float((self._loads[i][over] / totals[over]).sum() / self._price[i]) for i in candidates}
            self.kept.add(max(candidates, key=lambda i: (relief[i], -i)))

    def pruned(self, limit: float) -> set[int]:
        """Without the units whose INT8 the limit still allows, the least harmful first."""
        kept = set(self.kept)
        for i in sorted(self.accuracy, key=lambda i: float(self._loads[i].max()) / self._price[i]):
            if not (self._totals(kept - {i}) > limit).any():
                kept.remove(i)
        return kept

    def why(self, index: int) -> Why | None:
        if index not in self.kept:
            return None
        return "slower" if index in self.slower else "accuracy"

    def _totals(self, kept: set[int]) -> Array:
        rest = [i for i in range(len(self._price)) if i not in kept]
        totals: Array = self._loads[rest].sum(axis=0)
        return totals


def _loads(sensitivity: Sensitivity, criteria: Criteria) -> Array:
    """[units, conditions]: what part of the error a criterion allows one unit uses up, call by call."""
    noise = sensitivity.noise * 10 ** (criteria.sqnr_db / 10)
    # Noise that has nothing to do with a delta makes its norm √(1 + noise) times as large.
    deltas = sensitivity.guidance_noise / (criteria.guidance_ratio**-2 - 1)
    return np.concatenate([noise, deltas.reshape(len(noise), -1)], axis=1)


def _telling(calls: Sequence[Call], steps: Sequence[StepMetrics], criteria: Criteria, count: int) -> list[Call]:
    """``count`` of ``calls`` to measure layers on: half of them the worst ones, half spread over the timesteps."""

    def strain(i: int) -> float:
        ratios = [max(delta.ratio, 1 / delta.ratio) - 1 for delta in steps[i].guidance if delta.ratio]
        return max(
            10 ** ((criteria.sqnr_db - steps[i].sqnr_db) / 10),
            *(r / (1 / criteria.guidance_ratio - 1) for r in ratios),
            0.0,
        )

    worst = sorted(range(len(calls)), key=lambda i: -strain(i))[: count // 2]
    rest = [call for i, call in enumerate(calls) if i not in worst]
    others = spread([call.timestep for call in rest], count - len(worst))
    return [*(calls[i] for i in sorted(worst)), *(rest[i] for i in others)]


def _layer(sensitivity: Sensitivity, index: int, search: _Search) -> LayerChoice:
    unit, times = sensitivity.units[index], search.times[index]
    return LayerChoice(
        unit.name,
        unit.members,
        unit.op_type,
        sensitivity.sqnr_db(index),
        sensitivity.worst_sqnr_db(index),
        sensitivity.guidance_db(index),
        None if times is None else times[0],
        None if times is None else times[1],
        search.why(index),
    )


def _accuracy(steps: Sequence[StepMetrics]) -> dict[str, Any]:
    ratios = [delta.ratio for step in steps for delta in step.guidance]
    return {
        "worst_sqnr_db": min(step.sqnr_db for step in steps),
        "mean_sqnr_db": fmean(step.sqnr_db for step in steps),
        "guidance_ratio": [min(ratios), max(ratios)] if ratios else None,
    }
