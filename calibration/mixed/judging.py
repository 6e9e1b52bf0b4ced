"""One task of the search: its calls, what choices of layers do to them, and what each layer is said to do.

A choice's error is known before it is run, as the sum of its layers' errors. Where a run shows much more than that,
some layer does more than is said of it: what is said are estimates of the first order, and INT8 before a softmax, for
one, may do more than that. Such a layer is looked for by halves, each run on its own, and then measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from calibration.mixed.evaluating import ChoiceRunner, Criteria, telling_calls
from calibration.mixed.ranking import loads
from calibration.sensitivity import Sensitivity, estimate, measure, noise_of
from mtu_compile.accuracy.calls import StepMetrics

#: A sum of errors is wrong where a run shows this many times as much; by chance, it is off by a decibel.
_WRONG = 1.5
#: What no layer is looked for because of, as a part of what a criterion allows.
_HARMLESS = 0.2
#: Runs that are spent on looking, of a task and a choice.
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
    """

    runner: ChoiceRunner
    criteria: Criteria
    telling: tuple[int, ...]
    sensitivity: Sensitivity
    _known: dict[frozenset[int], dict[int, StepMetrics]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        runner: ChoiceRunner,
        criteria: Criteria,
        all_int8: Steps,
        *,
        calls: int,
        probes: int,
        progress: Callable[[int], None] | None,
    ) -> JudgedTask:
        """Estimate each layer's error on ``calls`` calls that ``all_int8``, everything in INT8, says most about."""
        telling = telling_calls(runner.calls, all_int8, criteria, calls)
        found = estimate(
            runner.graph,
            [runner.calls[i] for i in telling],
            guidance=runner.guidance,
            probes=probes,
            progress=progress,
        )
        task = cls(runner, criteria, tuple(telling), found, {frozenset(): dict(enumerate(all_int8))})
        task._measure(np.flatnonzero(np.isnan(found.noise).any(axis=1)).tolist())
        return task

    @property
    def all_int8(self) -> Steps:
        """What every layer in INT8 does."""
        return self.run(())

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

    def corrected(self, kept: Collection[int]) -> bool:
        """Measure the layers because of which a choice does more than the sum of its parts; whether there are any."""
        int8 = [i for i in range(len(self.sensitivity.groups)) if i not in kept]
        steps = self.run_telling(kept)
        worst = max(range(len(steps)), key=lambda i: self.criteria.strain(steps[i]))
        found = [i for i in self._underestimated(int8, worst, steps[worst]) if not self.sensitivity.measured[i].all()]
        self._measure(found)
        return bool(found)

    def _underestimated(self, int8: Sequence[int], place: int, step: StepMetrics) -> list[int]:
        """Groups of ``int8`` whose INT8 does more at a call than is known; ``step`` is what all of them do."""
        graph, call = self.runner.graph, self.runner.calls[self.telling[place]]
        found, looks = [], 0
        to_divide = [list(int8)] if self._wrong(int8, place, step) else []
        while to_divide and looks < _LOOKS:
            numbers = to_divide.pop(0)
            if len(numbers) == 1:
                found += numbers
                continue
            for half in (numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]):
                looks += 1
                names = [graph.groups[i].name for i in half]
                if self._wrong(half, place, self.runner.compare(call, names)):
                    to_divide.append(half)
        return found

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
        known, graph = self.sensitivity, self.runner.graph
        for place, call in enumerate(self.telling if len(numbers) else ()):
            results = measure(graph, self.runner.calls[call], numbers, guidance=self.runner.guidance)
            for number, (noise, deltas) in zip(numbers, results, strict=True):
                known.noise[number, place], known.guidance_noise[number, place] = noise, deltas
                known.measured[number, place] = True
