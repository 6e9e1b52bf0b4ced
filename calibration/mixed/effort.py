"""How much a search measures, and on what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from calibration.merged import MergedSet
from calibration.sensitivity import Feed, evenly_spread, timestep
from mtu_compile.core.guidance import Guidance

#: Networks with more weights than these are measured less: a run of the emoji example takes 20 ms, one of Stable
#: Diffusion 1.5 two seconds a sample, one of SDXL three times that, and there are dozens to hundreds.
LARGE, HUGE = 200_000_000, 1_500_000_000


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        calls: UNet calls each layer's error is known on.
        check_calls: calls a whole choice is run on.
        probes: passes backward for each of ``calls``, see ``calibration.sensitivity.estimate``.
        probes_if_met: the same where every layer may be in INT8: nothing is chosen by the estimates then, which are
            only told.
        looks: inferences that a search spends on looking for layers that do more than is said of them, of all tasks.
        rounds: inferences the layers are timed over.
        parallel: whether inferences that are not timed run beside each other, see ``SwitchedGraph``.
    """

    calls: int = 4
    check_calls: int = 20
    probes: int = 8
    probes_if_met: int = 8
    looks: int = 1000
    rounds: int = 96
    parallel: bool = True

    @classmethod
    def of(cls, weights: int) -> Effort:
        """What a network of so many weights is worth."""
        if weights <= LARGE:
            return cls()
        less = cls(calls=2, check_calls=6, probes=4, probes_if_met=1, looks=48, rounds=12, parallel=False)
        return less if weights <= HUGE else replace(less, check_calls=4, looks=24, rounds=6)

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

    def checked(self, effort: Effort) -> list[Feed]:
        """Those that choices of layers are run on, spread over the timesteps."""
        return [self.inputs[i] for i in evenly_spread([timestep(feed) for feed in self.inputs], effort.check_calls)]
