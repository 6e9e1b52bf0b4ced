"""One task of the search: its calls, what choices of layers do to them, and what each layer is said to do.

A choice's error is known before it is run, as the sum of its layers' errors. Where a run shows much more than that,
some layer does more than is said of it: what is said are estimates of the first order, and INT8 before a softmax, for
one, may do more than that. Such a layer is looked for by halves, each run on its own, and then measured.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.mixed.effort import Effort, TaskInputs
from calibration.mixed.errors import LayerErrors
from calibration.mixed.evaluating import ChoiceRunner, Criteria
from calibration.mixed.ranking import loads
from calibration.sensitivity import Call, Sensitivity, measure_again, noise_of
from calibration.switched_graph import SwitchedGraph
from mtu_compile.accuracy.calls import StepMetrics

#: A sum of errors is wrong where a run shows this many times as much; by chance, it is off by a decibel.
_WRONG = 1.5
#: What no layer is looked for because of, as a part of what a criterion allows.
_HARMLESS = 0.2
#: Inferences that are spent on looking at most, of a task and a choice.
_LOOKS = 24

Steps = tuple[StepMetrics, ...]


@dataclass
class JudgedTask:
    """A task while layers are chosen.

    Attributes:
        runner: of choices, on all its calls.
        criteria: what it has to keep.
        telling: places of the calls that layers' errors are known on, the worst in INT8 first.
        sensitivity: of the layers, on these.
        all_int8: what every layer in INT8 does.
    """

    runner: ChoiceRunner
    criteria: Criteria
    telling: tuple[int, ...]
    sensitivity: Sensitivity
    all_int8: Steps
    _known: dict[frozenset[int], dict[int, StepMetrics]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graph: SwitchedGraph,
        task: TaskInputs,
        errors: LayerErrors,
        name: str,
        criteria: Criteria,
        effort: Effort,
        *,
        of_this_graph: bool,
    ) -> JudgedTask:
        """What ``errors`` know of the task called ``name``; layers that they do not know are measured."""
        known = errors.tasks[name]
        pairs = zip(task.checked(effort), known.answers, strict=True)
        runner = ChoiceRunner(graph, [Call(feed, output) for feed, output in pairs], task.guidance)
        steps = zip(runner.calls, known.int8, strict=True)
        all_int8 = tuple(call.compare(output, task.guidance) for call, output in steps)
        judged = cls(runner, criteria, tuple(known.telling.tolist()), errors.of(name, graph.groups), all_int8)
        if of_this_graph:
            judged._known[frozenset()] = dict(enumerate(all_int8))
        judged._measure(judged.sensitivity.unknown)
        return judged

    def run(self, kept: Collection[int], places: Sequence[int] | None = None) -> Steps:
        """Every call, or those at ``places``, with the groups ``kept`` in float and all others in INT8."""
        wanted = range(len(self.runner.calls)) if places is None else places
        known = self._known.setdefault(frozenset(kept), {})
        new = [i for i in wanted if i not in known]
        known.update(zip(new, self.runner.run(kept, new), strict=True))
        return tuple(known[i] for i in wanted)

    def run_telling(self, kept: Collection[int]) -> Steps:
        """The calls that layers' errors are known on."""
        return self.run(kept, self.telling)

    def corrected(self, kept: Collection[int], looks: int) -> tuple[bool, int]:
        """Measure the layers because of which a choice does more than the sum of its parts.

        Returns:
            Whether there are any, and how many of the ``looks`` that are left it took to find them.
        """
        int8 = [i for i in range(len(self.sensitivity.groups)) if i not in kept]
        steps = self.run_telling(kept)
        worst = max(range(len(steps)), key=lambda i: self.criteria.strain(steps[i]))
        suspects, spent = self._underestimated(int8, worst, steps[worst], min(looks, _LOOKS))
        found = [i for i in suspects if not self.sensitivity.measured[i].all()]
        self._measure(found)
        return bool(found), spent

    def _underestimated(self, int8: Sequence[int], place: int, step: StepMetrics, most: int) -> tuple[list[int], int]:
        """Groups of ``int8`` whose INT8 does more at a call than is known, and the inferences that finding them took.

        Args:
            step: what all of them do.
            most: inferences it may take.
        """
        graph, call = self.runner.graph, self.runner.calls[self.telling[place]]
        found, looks = [], 0
        to_divide = [list(int8)] if self._wrong(int8, place, step) else []
        while to_divide:
            numbers = to_divide.pop(0)
            if len(numbers) == 1:
                found += numbers
                continue
            if looks + 2 > most:
                continue
            for half in (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]):
                looks += 1
                names = [graph.groups[i].name for i in half]
                if self._wrong(half, place, self.runner.compare(call, names)):
                    to_divide.append(half)
        return found, looks

    def _wrong(self, int8: Sequence[int], place: int, step: StepMetrics) -> bool:
        """Whether these groups do much more at a call than the sum of what each does."""
        noise, deltas = noise_of(step)
        done = loads(np.array([[noise]]), np.array([[deltas]]), self.criteria)[0]
        numbers = list(int8)
        one = slice(place, place + 1)
        known = self.sensitivity
        said = loads(known.noise[numbers, one], known.guidance_noise[numbers, one], self.criteria).sum(axis=0)
        return bool(((done > _WRONG * said) & (done - said > _HARMLESS)).any())

    def _measure(self, numbers: Sequence[int]) -> None:
        """Run these groups alone, on every call that errors are known on."""
        calls = [self.runner.calls[i] for i in self.telling]
        measure_again(self.sensitivity, self.runner.graph, calls, numbers, guidance=self.runner.guidance)
