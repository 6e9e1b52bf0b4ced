"""The search for the layers that stay float; see ``calibration.mixed``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from calibration.mixed.effort import Effort, TaskInputs
from calibration.mixed.errors import LayerErrors, layer_errors
from calibration.mixed.evaluating import Criteria, accuracy
from calibration.mixed.judging import JudgedTask, Steps
from calibration.mixed.ranking import Ranking
from calibration.sensitivity import Feed, Sensitivity
from calibration.switched_graph import SwitchedGraph
from mtu_compile.bundle.quantisation import CostsRecord, CriteriaRecord, LayerRecord, MixedRecord, Why
from mtu_compile.core.guidance import Guidance
from targets.costs.layers import ComparedCosts

#: Where the whole choice misses what its parts promised, the parts have to promise this much more.
_STRICTER = 0.8
_ROUNDS = 8
#: The search ends where so many stricter choices in succession come no nearer to the criteria.
_PATIENCE = 3

Array = NDArray[np.float64]


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
    errors: LayerErrors | None = None,
    of_this_graph: bool = False,
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
        errors: of the layers, of this graph or of one that was lowered otherwise; measured first if not given.
        of_this_graph: whether they are this very graph's, so that all of it in INT8 need not be run again.
        progress: called with 1 after each call that layers' errors are estimated on.

    Returns:
        By task, the choice, which is the same for all, and what was measured in this task.
    """
    criteria, effort = criteria or Criteria(), effort or Effort()
    if errors is None:
        errors, of_this_graph = layer_errors(graph, tasks, effort=effort, criteria=criteria, progress=progress), True
    judged = {
        name: JudgedTask.of(graph, task, errors, name, criteria, effort, of_this_graph=of_this_graph)
        for name, task in tasks.items()
    }
    steps, search = _searched(list(judged.values()), costs, criteria, effort.looks)
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


def _searched(
    tasks: Sequence[JudgedTask], costs: ComparedCosts | None, criteria: Criteria, looks: int
) -> tuple[list[Steps], _Search]:
    """What the choice does in every task, and the search that made it; ``looks`` as in ``Effort``."""

    def met(found: Iterable[Steps]) -> bool:
        return all(criteria.met_by(steps) for steps in found)

    def begin() -> _Search:
        return _Search(Ranking.of([task.sensitivity for task in tasks], costs, criteria))

    search, limit = begin(), 1.0
    strains = list[tuple[bool, float]]()
    best = frozenset(search.kept)
    for _ in range(_ROUNDS):
        # Most choices that miss the criteria miss them here: the other calls need not run.
        found, whole, corrected = [task.run_telling(search.kept) for task in tasks], False, False
        if met(found):
            found, whole = [task.run(search.kept) for task in tasks], True
            if met(found):
                return found, search
        elif search.accuracy:
            # The worst first, and no other where that one says something new of its layers.
            order = sorted(range(len(tasks)), key=lambda i: -max(map(criteria.strain, found[i])))
            for task in (tasks[i] for i in order if not criteria.met_by(found[i])):
                corrected, spent = task.corrected(search.kept, looks)
                looks -= spent
                if corrected:
                    break
        # Of two misses, the one that shows only on calls that layers' errors are not known on is the nearer.
        strain = not whole, max(criteria.strain(step) for steps in found for step in steps)
        if not strains or strain < min(strains):
            best = frozenset(search.kept)
        strains.append(strain)
        if len(strains) > _PATIENCE and min(strains[-_PATIENCE:]) >= min(strains[:-_PATIENCE]):
            break  # what is missed is not what the layers in INT8 add up to
        if corrected:
            search = begin()
        before = set(search.kept)
        while search.choose(limit) and search.kept == before and limit > _STRICTER**_ROUNDS:
            limit *= _STRICTER
        if search.kept == before:  # the budget is spent
            break
    search.kept = set(best)
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
