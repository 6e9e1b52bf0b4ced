"""From the exported UNet with its routers to graphs without, edited as the user wants: one a task, or one for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import passes
from mtu_compile import bundle
from mtu_compile.core.progress import Progress
from mtu_compile.core.routing import Routing
from mtu_compile.core.tasks import Task
from mtu_compile.stages.contexts import shared_context, task_context
from mtu_compile.stages.job import SHARED, Model, Specialised


def specialise(
    dynamic: Path,
    model: Model,
    work: Path,
    progress: Progress,
    edits: Sequence[passes.UserPass] = (),
    *,
    routing: Routing = "static",
) -> dict[str, Specialised]:
    """By task of ``model``, its graph in a folder of ``work``; or under ``SHARED`` the only one. For every target.

    Args:
        dynamic: the UNet with the task as an input.
        model: what it was exported from.
        work: gets a folder for each graph.
        progress: told of each graph and edit.
        edits: the user's own passes, run on each graph.
        routing: a graph for each task, or one for all.

    Raises:
        PassError: the routing cannot be specialised, or an edit does not hold; names the node, or the edit.
    """
    ids = {model.task_id(task): task for task in model.tasks}
    if routing == "shared":
        return {SHARED: _specialised(dynamic, SHARED, ids, model, work, progress, edits)}
    return {
        task.name: _specialised(dynamic, task.name, {task_id: task}, model, work, progress, edits)
        for task_id, task in ids.items()
    }


def _specialised(
    dynamic: Path,
    name: str,
    tasks: Mapping[int, Task],
    model: Model,
    work: Path,
    progress: Progress,
    edits: Sequence[passes.UserPass],
) -> Specialised:
    ids: tuple[str, ...]
    if name == SHARED:
        ids, context, width = passes.SHARED_PIPELINE, shared_context(model), model.most_channels
    else:
        (task,) = tasks.values()
        ids, context, width = passes.TASK_PIPELINE, task_context(model, task), model.channels(task)
    channels = {task.name: model.channels(task) for task in tasks.values()}
    unet = Specialised(name, tasks, channels, width, work / name / "model.onnx", ())
    with progress.stage(f"passes {unet.label}"):
        done = passes.run_pipeline(dynamic, unet.graph, ids, context)
    graph, records = unet.graph, list[bundle.UserPassRecord]()
    for edit in edits:
        with progress.stage(f"{edit.id} {unet.label}"):
            edited = graph.with_name(f"edited-{len(records) + 1}.onnx")
            result = passes.run_user_pass(edit, graph, edited)
        # Graphs are as large as the model: the one before an edit is not needed any more.
        graph.unlink()
        graph.with_name(f"{graph.name}.data").unlink(missing_ok=True)
        graph = edited
        records.append(bundle.UserPassRecord(**asdict(result)))
    return replace(unet, graph=graph, passes=pass_records(done), user_passes=tuple(records))


def pass_records(done: Sequence[passes.PassResult]) -> tuple[bundle.PassRecord, ...]:
    """Only what a manifest keeps: a result holds the graph."""
    return tuple(bundle.PassRecord(result.id, result.changed, result.rewrites) for result in done)
