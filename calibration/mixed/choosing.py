"""The search for the layers that stay float; see ``calibration.mixed``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from calibration.merged import MergedSet
from calibration.mixed.evaluating import ChoiceRunner, Criteria, accuracy
from calibration.mixed.judging import JudgedTask, Steps
from calibration.mixed.ranking import Ranking
from calibration.sensitivity import Feed, Sensitivity, answers, evenly_spread, timestep
from calibration.switched_graph import SwitchedGraph
from mtu_compile.bundle.quantisation import CostsRecord, CriteriaRecord, LayerRecord, MixedRecord, Why
from mtu_compile.core.guidance import Guidance
from targets.costs.layers import ComparedCosts

#: Networks with more weights than these are measured less: a run of the emoji example takes 20 ms, one of Stable
#: Diffusion 1.5 two seconds a sample, one of SDXL three times that, and there are dozens to hundreds.
LARGE, HUGE = 200_000_000, 1_500_000_000

#: Where the whole choice misses what its parts promised, the parts have to promise this much more.
_STRICTER = 0.8
_ROUNDS = 8

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        calls: UNet calls each layer's error is known on.
        check_calls: calls a whole choice is run on.
        probes: passes backward for each of ``calls``, see ``calibration.sensitivity.estimate``.
        probes_if_met: the same where every layer may be in INT8: nothing is chosen by the estimates then, which are
            only told.
        rounds: inferences the layers are timed over.
        parallel: whether inferences that are not timed run beside each other, see ``SwitchedGraph``.
    """

    calls: int = 4
    check_calls: int = 20
    probes: int = 8
    probes_if_met: int = 8
    rounds: int = 96
    parallel: bool = True

    @classmethod
    def of(cls, weights: int) -> Effort:
        """What a network of so many weights is worth."""
        if weights <= LARGE:
            return cls()
        less = cls(calls=2, check_calls=6, probes=4, probes_if_met=1, rounds=12, parallel=False)
        return less if weights <= HUGE else replace(less, check_calls=4, rounds=6)

    def split(self, tasks: int) -> Effort:
        """What is measured for each of so many tasks that share one network.

        Together they are measured on twice the calls that one has by itself, and each on one at least.
        """
        if tasks == 1:
            return self
        return replace(self, calls=max(1, 2 * self.calls // tasks), check_calls=max(1, 2 * self.check_calls // tasks))

    def estimates(self, inputs: Iterable[int]) -> int:
        """How often ``progress`` is called: calls that layers' errors are estimated on.

        Args:
            inputs: how many UNet calls there are of each task.
        """
        return sum(min(self.calls, self.check_calls, count) for count in inputs)


@dataclass(frozen=True)
class TaskInputs:
    """What layers are judged on for one task.

    Attributes:
        inputs: of the UNet, the task's calibration set; a few of them are used, the same every time.
        guidance: the task's kind of guidance.
    """

    inputs: Sequence[Feed]
    guidance: Guidance

    @classmethod
    def of_each(cls, merged: MergedSet) -> dict[str, TaskInputs]:
        """By task, its part of a merged calibration set."""
        return {task: cls(merged.of_task(task), guidance) for task, guidance in merged.guidance.items()}


def choose(
    graph: SwitchedGraph,
    inputs: Sequence[Feed],
    *,
    guidance: Guidance,
    effort: Effort | None = None,
    costs: ComparedCosts | None = None,
    criteria: Criteria | None = None,
    progress: Callable[[int], None] | None = None,
) -> MixedRecord:
    """Choose the layers of one task's UNet that stay float.

    Args:
        graph: the float graph with its INT8 twin, quantised as the device will run it.
        inputs: of the UNet, the task's calibration set; a few of them are used, the same every time.
        guidance: the task's kind of guidance.
        effort: how much is measured; what a small network is worth if not given.
        costs: what the layers cost on the device.
        criteria: what to keep; the defaults of ``Criteria`` if not given.
        progress: called with 1 after each call that layers' errors are estimated on.
    """
    task = {"": TaskInputs(inputs, guidance)}
    return choose_for_all(graph, task, effort=effort, costs=costs, criteria=criteria, progress=progress)[""]


def choose_for_all(
    graph: SwitchedGraph,
    tasks: Mapping[str, TaskInputs],
    *,
    effort: Effort | None = None,
    costs: ComparedCosts | None = None,
    criteria: Criteria | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, MixedRecord]:
    """Choose the layers that stay float in one UNet for several tasks, each of which is held to the criteria.

    A layer's error is another in each task. So it is measured in each, a call of any task that misses the criteria
    makes layers float, and the choice is done when no call of any task does.

    Args:
        graph: the float graph with its INT8 twin, quantised as the device will run it.
        tasks: by name, what each is judged on.
        effort: how much is measured for each task, see ``Effort.split``; what a small network is worth if not given.
        costs: what the layers cost on the device.
        criteria: what each task has to keep; the defaults of ``Criteria`` if not given.
        progress: called with 1 after each call that layers' errors are estimated on.

    Returns:
        By task, the choice, which is the same for all, and what was measured in this task.
    """
    criteria, effort = criteria or Criteria(), effort or Effort()
    judged = _judged(graph, tasks, criteria, effort, progress)
    steps, search = _searched(list(judged.values()), costs, criteria)
    return {
        name: MixedRecord(
            criteria=CriteriaRecord(**asdict(criteria)),
            met=criteria.met_by(found),
            calls=len(task.telling),
            check_calls=len(task.runner.calls),
            layers=tuple(_layer(task.sensitivity, i, search) for i in range(len(graph.groups))),
            costs=None if costs is None else CostsRecord(costs.source, costs.measured),
            all_int8=accuracy(task.all_int8),
            chosen=accuracy(found),
            chosen_for=tuple(tasks) if len(tasks) > 1 else (),
        )
        for (name, task), found in zip(judged.items(), steps, strict=True)
    }


def _judged(
    graph: SwitchedGraph,
    tasks: Mapping[str, TaskInputs],
    criteria: Criteria,
    effort: Effort,
    progress: Callable[[int], None] | None,
) -> dict[str, JudgedTask]:
    """What INT8 of all layers does in each task, and then, as exactly as that makes it needed, what each layer does."""
    runners, all_int8 = dict[str, ChoiceRunner](), dict[str, Steps]()
    for name, task in tasks.items():
        timesteps = [timestep(feed) for feed in task.inputs]
        calls = answers(graph, [task.inputs[i] for i in evenly_spread(timesteps, effort.check_calls)])
        runners[name] = ChoiceRunner(graph, calls, task.guidance)
        all_int8[name] = runners[name].run(())
    met = all(criteria.met_by(steps) for steps in all_int8.values())
    probes = effort.probes_if_met if met else effort.probes
    return {
        name: JudgedTask.of(runner, criteria, all_int8[name], calls=effort.calls, probes=probes, progress=progress)
        for name, runner in runners.items()
    }


def _searched(
    tasks: Sequence[JudgedTask], costs: ComparedCosts | None, criteria: Criteria
) -> tuple[list[Steps], _Search]:
    """What the choice does in every task, and the search that made it."""

    def met(found: Iterable[Steps]) -> bool:
        return all(criteria.met_by(steps) for steps in found)

    def begin() -> _Search:
        return _Search(Ranking.of([task.sensitivity for task in tasks], costs, criteria))

    search, limit = begin(), 1.0
    for _ in range(_ROUNDS):
        # Most choices that miss the criteria miss them here: the other calls need not run.
        if met(task.run_telling(search.kept) for task in tasks):
            if met(task.run(search.kept) for task in tasks):
                break
        elif search.accuracy and sum(task.corrected(search.kept) for task in tasks):
            search = begin()
        before = set(search.kept)
        while search.choose(limit) and search.kept == before and limit > _STRICTER**_ROUNDS:
            limit *= _STRICTER
        if search.kept == before:  # the budget is spent
            break
    return [task.run(search.kept) for task in tasks], search


def to_blame(record: MixedRecord, count: int = 3) -> str:
    """In words, the INT8 layers of a recorded choice that cost the most accuracy."""
    worst = sorted((layer for layer in record.layers if layer.kept is None), key=lambda layer: layer.sqnr_db)[:count]
    return ", ".join(f"{layer.name} ({layer.sqnr_db:.1f} dB alone)" for layer in worst)


class _Search:
    """Which groups stay float; starts with those the device runs slower in INT8."""

    def __init__(self, ranking: Ranking) -> None:
        self.ranking = ranking
        self.kept: set[int] = set(ranking.slower)

    @property
    def accuracy(self) -> set[int]:
        """Groups that are float for accuracy."""
        return self.kept - self.ranking.slower

    def reduce(self, limit: float) -> bool:
        """Make groups float until no load is above ``limit``; ``False`` if the budget is spent before."""
        ranking = self.ranking
        while True:
            totals = self._totals(self.kept)
            over = totals > limit
            if not over.any():
                return True
            spent = sum(ranking.prices[i] for i in self.accuracy)
            candidates = [
                i
                for i in range(len(ranking.prices))
                if i not in self.kept and spent + ranking.prices[i] <= ranking.budget and ranking.loads[i][over].any()
            ]
            if not candidates:
                return False
            relief = {i: ranking.relief(i, over, totals) for i in candidates}
            self.kept.add(max(candidates, key=lambda i: (relief[i], -i)))

    def choose(self, limit: float) -> bool:
        """``reduce``, and give back the groups whose INT8 the limit still allows, the least harmful first."""
        if not self.reduce(limit):
            return False
        for i in sorted(self.accuracy, key=self.ranking.harm):
            if not (self._totals(self.kept - {i}) > limit).any():
                self.kept.remove(i)
        return True

    def why(self, index: int) -> Why | None:
        if index not in self.kept:
            return None
        return "slower" if index in self.ranking.slower else "accuracy"

    def _totals(self, kept: set[int]) -> Array:
        """[conditions]: what all groups in INT8 use up together."""
        rest = [i for i in range(len(self.ranking.prices)) if i not in kept]
        totals: Array = self.ranking.loads[rest].sum(axis=0)
        return totals


def _layer(sensitivity: Sensitivity, index: int, search: _Search) -> LayerRecord:
    group, times = sensitivity.groups[index], search.ranking.times[index]
    return LayerRecord(
        group.name,
        group.members,
        group.op_type,
        sensitivity.sqnr_db(index),
        sensitivity.worst_sqnr_db(index),
        sensitivity.guidance_db(index),
        None if times is None else times[0],
        None if times is None else times[1],
        search.why(index),
        bool(sensitivity.measured[index].all()),
    )
