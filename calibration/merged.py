"""The calibration sets of several tasks as one set, for the one graph that serves them all.

The tasks take turns: every part of the merged set, from its beginning on, has of each task what the whole has of it.
Nothing is copied: what a shared graph wants beside a call of one task (zeros in the channels the task does not have,
and the task's id) is made when the call is read.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sets import CalibrationSet
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.guidance import Guidance
from mtu_compile.core.tasks import Task
from mtu_compile.graph.edit import SAMPLE, TASK

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class TaskCall(Mapping[str, Array]):
    """One UNet call of one task, by input name of the shared graph: its arrays are made when they are asked for.

    ``sample`` [b, ``channels``, h, w] with zeros behind the task's own channels, ``task`` [b] int64, and whatever else
    the call has (``timestep`` [1], ``encoder_hidden_states`` [b, L, D], …) as it is.

    Attributes:
        task: name of the task.
        task_id: its row in the shared graph's tables.
        guidance: the kind of guidance its samples are of.
        channels: those of the shared graph's ``sample``.
        call: inputs of the task's own static graph.
    """

    task: str
    task_id: int
    guidance: Guidance
    channels: int
    call: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        if name == TASK:
            return np.full(len(self.call[SAMPLE]), self.task_id, np.int64)
        array = self.call[name]
        if name != SAMPLE or array.shape[1] == self.channels:
            return array
        missing = self.channels - array.shape[1]
        return np.pad(array, ((0, 0), (0, missing), *((0, 0),) * (array.ndim - 2)))

    def __iter__(self) -> Iterator[str]:
        yield from self.call
        yield TASK

    def __len__(self) -> int:
        return len(self.call) + 1


@dataclass(frozen=True)
class MergedSet:
    """What one shared graph is quantised with: the calibration sets of its tasks, which take turns.

    Stands where a ``CalibrationSet`` does: for ``calibration.quantize``, ``calibration.ranges`` and
    ``calibration.mixed``.

    Attributes:
        sets: by task, its set.
        task_ids: by task, its row in the shared graph's tables.
        guidance: by task, the kind of guidance that its calls are of.
        channels: of the shared graph's ``sample``: those of the widest task.
    """

    sets: Mapping[str, CalibrationSet]
    task_ids: Mapping[str, int]
    guidance: Mapping[str, Guidance]
    channels: int

    def __post_init__(self) -> None:
        if not self.sets:
            raise CalibrationError("there are no calibration sets to merge")
        for name in ("model_sha256", "size", "latent_channels"):
            values = {task: getattr(one, name) for task, one in self.sets.items()}
            (first, expected), *others = values.items()
            for task, value in others:
                value, expected = (tuple(v) if name == "size" else v for v in (value, expected))
                if value != expected:
                    raise CalibrationError(
                        f"the calibration sets of {first!r} and {task!r} do not go together: "
                        f"{name} {expected!r} and {value!r}",
                        hint="capture them of one model, with one --size",
                    )
        for task, one in self.sets.items():
            for call in one.inputs:
                if (have := call[SAMPLE].shape[1]) > self.channels:
                    raise CalibrationError(
                        f"the calibration set of {task!r} has {have} channels, and the shared graph {self.channels}"
                    )

    @classmethod
    def of(cls, sets: Mapping[str, CalibrationSet], tasks: Mapping[int, Task], *, channels: int) -> MergedSet:
        """The sets of ``tasks``, which are given by their id in the model; sets of other tasks are left out.

        Raises:
            CalibrationError: a task without a set, or sets that do not go together.
        """
        if missing := [task.name for task in tasks.values() if task.name not in sets]:
            raise CalibrationError(f"there is no calibration set for task {missing[0]!r}")
        return cls(
            {task.name: sets[task.name] for task in tasks.values()},
            {task.name: number for number, task in tasks.items()},
            {task.name: task.guided for task in tasks.values()},
            channels,
        )

    @cached_property
    def inputs(self) -> Sequence[TaskCall]:
        """Every call of every task, the tasks in turns: of unequal sets, the larger has its turn more often."""
        places = [
            ((2 * i + 1) / (2 * len(one.inputs)), order, task, i)
            for order, (task, one) in enumerate(self.sets.items())
            for i in range(len(one.inputs))
        ]
        return tuple(self._call(task, i) for _, _, task, i in sorted(places))

    def of_task(self, task: str) -> Sequence[TaskCall]:
        """The calls of one task, in the order of its set."""
        return tuple(self._call(task, i) for i in range(len(self.sets[task].inputs)))

    def subset(self, count: int) -> Sequence[TaskCall]:
        """``count`` of the calls, as many of each task as its part of the whole is, and spread evenly over its set.

        Even distances in ``inputs`` would not do: the tasks take turns there, so that they may meet one task alone.
        """
        if count >= len(self.inputs):
            return self.inputs
        wanted = dict.fromkeys(self.sets, 0)
        for call in self.inputs[:count]:
            wanted[call.task] += 1
        picked = {task: iter(spread(self.of_task(task), number)) for task, number in wanted.items()}
        return tuple(next(picked[call.task]) for call in self.inputs[:count])

    @property
    def batch(self) -> int:
        """How many samples most calls have; of equally frequent numbers the largest."""
        sizes = Counter(len(call.call[SAMPLE]) for call in self.inputs)
        return max(sizes, key=lambda size: (sizes[size], size))

    @property
    def sha256(self) -> str:
        """Hash of everything in it: of the tasks' own sets, and how they are merged."""
        told = {
            "channels": self.channels,
            "sets": [[task, self.task_ids[task], self.guidance[task], one.sha256] for task, one in self.sets.items()],
        }
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a reader wants to know of it, as JSON: its hash, and by task ``CalibrationSet.describe``."""
        return {"sha256": self.sha256, "tasks": {task: one.describe() for task, one in self.sets.items()}}

    def _call(self, task: str, index: int) -> TaskCall:
        inputs = self.sets[task].inputs[index]
        return TaskCall(task, self.task_ids[task], self.guidance[task], self.channels, inputs)


def spread(calls: Sequence[Any], count: int) -> list[Any]:
    """``count`` of ``calls`` at even distances: neighbours in a set are steps of one picture."""
    if count >= len(calls):
        return list(calls)
    return [calls[i] for i in np.linspace(0, len(calls) - 1, count).round().astype(int)]
