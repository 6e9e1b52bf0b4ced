"""A choice of layers, run as a whole: what it has to keep, and what it does keep."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

from calibration.sensitivity import Call, compare_calls, evenly_spread
from calibration.switched_graph import SwitchedGraph
from mtu_compile.accuracy.calls import StepMetrics
from mtu_compile.bundle.quantisation import ReachedRecord
from mtu_compile.core.guidance import Guidance


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

    def strain(self, step: StepMetrics) -> float:
        """How much of the error that is allowed a UNet call uses up; more than 1 is a miss."""
        ratios = [max(delta.ratio, 1 / delta.ratio) - 1 for delta in step.guidance if delta.ratio]
        return max(
            10 ** ((self.sqnr_db - step.sqnr_db) / 10),
            *(ratio / (1 / self.guidance_ratio - 1) for ratio in ratios),
            0.0,
        )


@dataclass(frozen=True)
class ChoiceRunner:
    """Runs choices on the same UNet calls.

    Attributes:
        graph: the float graph with its INT8 twin.
        calls: what the float graph answers.
        guidance: the task's kind of guidance.
    """

    graph: SwitchedGraph
    calls: Sequence[Call]
    guidance: Guidance

    def run(self, kept: Collection[int], places: Sequence[int] | None = None) -> tuple[StepMetrics, ...]:
        """Every call, or those at ``places``, with the groups ``kept``, by number, in float and all others in INT8."""
        quantised = [group.name for i, group in enumerate(self.graph.groups) if i not in kept]
        calls = self.calls if places is None else [self.calls[i] for i in places]
        return compare_calls(self.graph, calls, quantised, guidance=self.guidance)

    def compare(self, call: Call, int8: Collection[str]) -> StepMetrics:
        """One call with the groups named in ``int8`` quantised."""
        return compare_calls(self.graph, [call], int8, guidance=self.guidance)[0]


def telling_calls(calls: Sequence[Call], steps: Sequence[StepMetrics], criteria: Criteria, count: int) -> list[int]:
    """Places of ``count`` of ``calls`` to know layers on: half of them the worst, half spread over the timesteps.

    A single one is the worst.

    Args:
        steps: what all layers in INT8 make of each of ``calls``.
    """
    worst = sorted(range(len(calls)), key=lambda i: -criteria.strain(steps[i]))[: max(1, count // 2)]
    rest = [i for i in range(len(calls)) if i not in worst]
    others = evenly_spread([calls[i].timestep for i in rest], count - len(worst))
    return [*sorted(worst), *(rest[i] for i in others)]


def accuracy(steps: Sequence[StepMetrics]) -> ReachedRecord:
    """What is recorded of a choice: SQNR at the worst call and on average, and the range of the guidance ratios."""
    ratios = [delta.ratio for step in steps for delta in step.guidance]
    return ReachedRecord(
        worst_sqnr_db=min(step.sqnr_db for step in steps),
        mean_sqnr_db=fmean(step.sqnr_db for step in steps),
        guidance_ratio=(min(ratios), max(ratios)) if ratios else None,
    )
