"""What the layers are ranked by: the error that INT8 costs each, and the time that it saves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.mixed.evaluating import Criteria
from calibration.sensitivity import Sensitivity
from targets.costs.layers import ComparedCosts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """The units of a graph, by number.

    Attributes:
        loads: [units, conditions] what part of the error a criterion allows a unit in INT8 uses up, call by call.
        prices: [units] milliseconds that a unit in float costs; all are equally dear where nothing is known of time.
        budget: how much of that may be spent for accuracy's sake.
        times: (float, INT8) milliseconds of each unit; ``None`` where nothing is known.
        slower: units that the device was measured to run slower in INT8.
    """

    loads: Array
    prices: Array
    budget: float
    times: tuple[tuple[float, float] | None, ...]
    slower: frozenset[int]

    @classmethod
    def of(cls, sensitivity: Sensitivity, costs: ComparedCosts | None, criteria: Criteria) -> Ranking:
        """By measured errors, and what the layers cost on the device, if that is known."""
        units, loads = sensitivity.units, _loads(sensitivity, criteria)
        if costs is None:
            return cls(loads, np.ones(len(units)), criteria.slowdown * len(units), (None,) * len(units), frozenset())
        spent = [tuple(sum(costs.layers[name][side] for name in unit.members) for side in (0, 1)) for unit in units]
        times = tuple((in_float, quantised) for in_float, quantised in spent)
        gains = np.array([in_float - quantised for in_float, quantised in times])
        slower: frozenset[int] = frozenset()
        if costs.measured:
            members = set(costs.slower({unit.members for unit in units}))
            slower = frozenset(i for i, unit in enumerate(units) if unit.members in members)
        return cls(
            loads,
            prices=np.maximum(gains, max(float(np.abs(gains).mean()) * 0.01, 1e-9)),
            budget=costs.int8_costs.total_ms * (1 / (1 - criteria.slowdown) - 1),
            times=times,
            slower=slower,
        )

    def relief(self, unit: int, over: NDArray[np.bool_], totals: Array) -> float:
        """By how much a unit in float relieves the conditions ``over`` their limit, for its price."""
        return float((self.loads[unit][over] / totals[over]).sum() / self.prices[unit])

    def harm(self, unit: int) -> float:
        """What a unit's INT8 does at the worst condition, for its price."""
        return float(self.loads[unit].max()) / float(self.prices[unit])


def _loads(sensitivity: Sensitivity, criteria: Criteria) -> Array:
    noise = sensitivity.noise * 10 ** (criteria.sqnr_db / 10)
    # Noise that has nothing to do with a delta makes its norm √(1 + noise) times as large.
    deltas = sensitivity.guidance_noise / (criteria.guidance_ratio**-2 - 1)
    return np.concatenate([noise, deltas.reshape(len(noise), -1)], axis=1)
