"""What the layers are ranked by: the error that INT8 costs each, and the time that it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.mixed.evaluating import Criteria
from calibration.sensitivity import Sensitivity
from targets.costs.layers import ComparedCosts

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """The groups of a graph, by number.

    Attributes:
        loads: [groups, conditions] what part of the error a criterion allows a group in INT8 uses up, call by call of
            every task.
        prices: [groups] milliseconds that a group in float costs; all are equally dear where nothing is known of time.
        budget: how much of that may be spent for accuracy's sake.
        times: (float, INT8) milliseconds of each group; ``None`` where nothing is known.
        slower: groups that the device was measured to run slower in INT8.
    """

    loads: Array
    prices: Array
    budget: float
    times: tuple[tuple[float, float] | None, ...]
    slower: frozenset[int]

    @classmethod
    def of(cls, sensitivities: Sequence[Sensitivity], costs: ComparedCosts | None, criteria: Criteria) -> Ranking:
        """By measured errors, of each task that the network serves, and what the layers cost, if that is known."""
        groups = sensitivities[0].groups
        used = [loads(sensitivity.noise, sensitivity.guidance_noise, criteria) for sensitivity in sensitivities]
        together = np.concatenate(used, axis=1)
        if costs is None:
            return cls(
                together, np.ones(len(groups)), criteria.slowdown * len(groups), (None,) * len(groups), frozenset()
            )
        spent = [tuple(sum(costs.layers[name][side] for name in group.members) for side in (0, 1)) for group in groups]
        times = tuple((in_float, quantised) for in_float, quantised in spent)
        gains = np.array([in_float - quantised for in_float, quantised in times])
        slower: frozenset[int] = frozenset()
        if costs.measured:
            members = set(costs.slower({group.members for group in groups}))
            slower = frozenset(i for i, group in enumerate(groups) if group.members in members)
        return cls(
            together,
            prices=np.maximum(gains, max(float(np.abs(gains).mean()) * 0.01, 1e-9)),
            budget=costs.int8_costs.total_ms * (1 / (1 - criteria.slowdown) - 1),
            times=times,
            slower=slower,
        )

    def relief(self, group: int, over: NDArray[np.bool_], totals: Array) -> float:
        """By how much a group in float relieves the conditions ``over`` their limit, for its price."""
        return float((self.loads[group][over] / totals[over]).sum() / self.prices[group])

    def harm(self, group: int) -> float:
        """What a group's INT8 does at the worst condition, for its price."""
        return float(self.loads[group].max()) / float(self.prices[group])


def loads(noise: Array, guidance_noise: Array, criteria: Criteria) -> Array:
    """[groups, conditions] the part of the error that each criterion allows at each call, which groups use up.

    Args:
        noise, guidance_noise: as in ``Sensitivity``.
    """
    of_output = noise * 10 ** (criteria.sqnr_db / 10)
    # Noise that has nothing to do with a delta makes its norm √(1 + noise) times as large.
    of_deltas = guidance_noise / (criteria.guidance_ratio**-2 - 1)
    return np.concatenate([of_output, of_deltas.reshape(len(noise), -1)], axis=1)
