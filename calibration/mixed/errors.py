"""What INT8 does to each task, layer by layer and of all layers together: the same for every device that runs them.

It takes most of a search's time, and does not depend on what the device is good at: a build for several targets
measures it once. Where a target's graph has the same layers in INT8 and rounds a few weights again, it is a decibel or
two off at most; what a choice of layers really does is run on each target's own graph (``judging``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from calibration.layer_groups import LayerGroup
from calibration.mixed.effort import Effort, TaskInputs
from calibration.mixed.evaluating import Criteria, telling_calls
from calibration.sensitivity import Sensitivity, answers, estimate, measure_again
from calibration.switched_graph import SwitchedGraph

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class TaskErrors:
    """Of one task.

    Attributes:
        answers: [calls, b, c, h, w] what the float graph says at each call that choices are checked on.
        int8: the same of all layers in INT8.
        telling: places of the calls that layers' errors are known on, the worst in INT8 first.
        noise, guidance_noise, measured: as in ``Sensitivity``, on these.
    """

    answers: Floats
    int8: Floats
    telling: NDArray[np.int64]
    noise: NDArray[np.float64]
    guidance_noise: NDArray[np.float64]
    measured: NDArray[np.bool_]


@dataclass(frozen=True)
class LayerErrors:
    """Of every task that the network serves.

    Attributes:
        groups: names of the layers of each group.
        tasks: by name.
    """

    groups: tuple[tuple[str, ...], ...]
    tasks: Mapping[str, TaskErrors]

    def of(self, task: str, groups: Sequence[LayerGroup]) -> Sensitivity:
        """What is known of ``groups``, which may be those of another graph; nan of one that is not known."""
        known = self.tasks[task]
        row = {members: number for number, members in enumerate(self.groups)}
        rows = [row.get(group.members, -1) for group in groups]
        lost = np.array([one < 0 for one in rows])
        noise, guidance_noise, measured = known.noise[rows], known.guidance_noise[rows], known.measured[rows]
        noise[lost], guidance_noise[lost], measured[lost] = np.nan, np.nan, False
        return Sensitivity(tuple(groups), noise, guidance_noise, measured)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {f"{name}/{key}": one for name, task in self.tasks.items() for key, one in vars(task).items()}
        told = {"groups": self.groups, "tasks": list(self.tasks)}
        save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()}, path, {"of": json.dumps(told)})

    @classmethod
    def load(cls, path: Path) -> LayerErrors:
        """Read what ``save`` wrote."""
        with safe_open(path, framework="numpy") as file:
            told = json.loads(file.metadata()["of"])
            keys = TaskErrors.__dataclass_fields__
            tasks = {
                name: TaskErrors(**{key: file.get_tensor(f"{name}/{key}") for key in keys}) for name in told["tasks"]
            }
        return cls(tuple(map(tuple, told["groups"])), tasks)


def layer_errors(
    graph: SwitchedGraph,
    tasks: Mapping[str, TaskInputs],
    *,
    effort: Effort,
    criteria: Criteria | None = None,
    progress: Callable[[int], None] | None = None,
) -> LayerErrors:
    """Run all layers in INT8 in each task, and then, as exactly as that makes it needed, find what each layer does.

    Args:
        graph: the float graph with its INT8 twin.
        tasks: by name, what each is judged on.
        effort: how much is measured for each task.
        criteria: what says which calls tell most.
        progress: called with 1 after each call that layers' errors are estimated on.
    """
    criteria = criteria or Criteria()
    everything = {group.name for group in graph.groups}
    calls, quantised, steps = {}, {}, {}
    for name, task in tasks.items():
        calls[name] = answers(graph, task.checked(effort))
        quantised[name] = list(graph.run_all([call.inputs for call in calls[name]], everything))
        pairs = zip(calls[name], quantised[name], strict=True)
        steps[name] = tuple(call.compare(output, task.guidance) for call, output in pairs)
    met = all(criteria.met_by(of_task) for of_task in steps.values())
    probes = effort.probes_if_met if met else effort.probes
    found = {}
    for name, task in tasks.items():
        telling = telling_calls(calls[name], steps[name], criteria, effort.calls)
        told = [calls[name][i] for i in telling]
        known = estimate(graph, told, guidance=task.guidance, probes=probes, progress=progress)
        measure_again(known, graph, told, known.unknown, guidance=task.guidance)
        found[name] = TaskErrors(
            np.stack([call.output for call in calls[name]]),
            np.stack(quantised[name]),
            np.array(telling, np.int64),
            known.noise,
            known.guidance_noise,
            known.measured,
        )
    return LayerErrors(tuple(group.members for group in graph.groups), found)
