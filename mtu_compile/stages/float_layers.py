"""Which layers stay float beside INT8: what INT8 does to each task, once, and each target's choice by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import passes
from calibration.merged import MergedSet
from calibration.mixed import Effort, LayerErrors, TaskInputs, choose_for_all, layer_errors
from calibration.mixed.times import compare_costs_at
from calibration.sets import CalibrationSet
from calibration.switched_graph import SwitchedGraph
from mtu_compile.bundle.quantisation import MixedRecord
from mtu_compile.graph import io as graph_io
from mtu_compile.stages.job import Specialised
from mtu_compile.stages.on_target import OnTarget
from mtu_compile.stages.quantising import TOOLS, inputs_of
from mtu_compile.steps import Steps, Work, step
from targets.base import Target
from targets.costs.layers import compare_costs

#: Passes that decide which layers are INT8; whatever else targets want rounds a few weights again at most.
WHICH_LAYERS: tuple[str, ...] = ("mtu::legalise-qdq",)

#: Passes that change the type of what is not quantised, and leave the quantised layers as they are.
HALF: tuple[str, ...] = ("mtu::to-fp16", "mtu::to-bf16")


@dataclass(frozen=True)
class KnownErrors:
    """What INT8 does to each task, layer by layer.

    Attributes:
        file: ``calibration.mixed.LayerErrors``.
        passes: that the INT8 graph went through before.
    """

    file: Path
    passes: tuple[str, ...]


def choose_layers(
    steps: Steps, target: Target, unet: Specialised, sets: Mapping[str, Path], int8: Path
) -> Mapping[str, MixedRecord]:
    """Choose the layers of the graph ``int8`` that stay float on a target; by task, what was measured."""
    which = tuple(name for name in target.spec.lowering.get("int8", ()) if name in WHICH_LAYERS)
    errors = steps.run(known_errors.of(f"measure layers {unet.label}", which, unet, sets, int8))
    here = OnTarget.of(target)
    return steps.run(chosen_layers.of(f"choose layers {unet.label}", here, unet, sets, int8, errors))


@step(tools=(*TOOLS, "torch"), cpu=True)
def known_errors(
    work: Work, which: tuple[str, ...], unet: Specialised, sets: Mapping[str, Path], int8: Path
) -> KnownErrors:
    """Measure what INT8 does to each task, layer by layer, after the passes called ``which``."""
    tasks, effort = _judged_on(unet, inputs_of(unet, sets))
    with ExitStack() as there:
        quantised = there.enter_context(_lowered_beside(int8, which, original=unet.graph))
        graph = there.enter_context(SwitchedGraph(unet.graph, quantised, parallel=effort.parallel))
        total = effort.estimates(len(task.inputs) for task in tasks.values())
        with work.progress.stage(f"measure layers {unet.label}", total) as advance:
            found = layer_errors(graph, tasks, effort=effort, progress=advance)
    file = work.folder / "errors.safetensors"
    found.save(file)
    return KnownErrors(file, which)


@step(tools=TOOLS, cpu=True)
def chosen_layers(
    work: Work, target: OnTarget, unet: Specialised, sets: Mapping[str, Path], int8: Path, errors: KnownErrors
) -> Mapping[str, MixedRecord]:
    """Time the layers on the target, and choose those that stay float; by task, what was measured."""
    device, calibration, progress = target.target, inputs_of(unet, sets), work.progress
    tasks, effort = _judged_on(unet, calibration)
    ids = device.spec.lowering
    lowering = ids.get("int8", ())
    # The numbers the device multiplies, in float32 still.
    exact = tuple(name for name in lowering if name not in HALF)
    with ExitStack() as there:
        with progress.stage(f"time layers {unet.label}"), ExitStack() as meanwhile:
            as_built = there if exact == lowering else meanwhile
            quantised = as_built.enter_context(_lowered_beside(int8, lowering, original=unet.graph))
            half = ids.get(device.companion_precision("int8"), ())
            in_float = meanwhile.enter_context(_lowered_beside(unet.graph, half))
            compare = compare_costs
            if isinstance(calibration, MergedSet):
                compare = partial(compare_costs_at, batch=device.spec.shared_batch or calibration.batch)
            costs = compare(device, in_float, quantised, rounds=effort.rounds)
        multiplied = quantised
        if exact != lowering:
            multiplied = there.enter_context(_lowered_beside(int8, exact, original=unet.graph))
        graph = there.enter_context(SwitchedGraph(unet.graph, multiplied, parallel=effort.parallel))
        with progress.stage(f"choose layers {unet.label}"):
            return choose_for_all(
                graph,
                tasks,
                effort=effort,
                costs=costs,
                errors=LayerErrors.load(errors.file),
                of_this_graph=exact == errors.passes,
            )


def _judged_on(unet: Specialised, calibration: CalibrationSet | MergedSet) -> tuple[Mapping[str, TaskInputs], Effort]:
    """What choices of layers are judged on, by task, and how much is measured of each."""
    effort = Effort.of(graph_io.disk_bytes(unet.graph) // 4)
    if isinstance(calibration, MergedSet):
        return TaskInputs.of_each(calibration), effort.split(len(unet.tasks))
    return {task.name: TaskInputs(calibration.inputs, task.guided) for task in unet.tasks.values()}, effort


@contextmanager
def _lowered_beside(graph: Path, ids: tuple[str, ...], *, original: Path | None = None) -> Iterator[Path]:
    """``graph`` after the passes called ``ids``, for a while; the very one where there are none."""
    if not ids:
        yield graph
        return
    with graph_io.beside(graph, "lowered") as out:
        passes.run_pipeline(graph, out, ids, passes.PassContext(original=original), reuse=True)
        yield out
