"""From the UNet with the task as an input to the static graph of each task, edited as the user wants it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import passes
from mtu_compile import bundle
from mtu_compile.core.progress import Progress
from mtu_compile.stages.job import Model, Specialised


def specialise(
    dynamic: Path, model: Model, work: Path, progress: Progress, edits: Sequence[passes.UserPass] = ()
) -> dict[str, Specialised]:
    """By task of ``model``, its graph in a folder of ``work``: the same for every target.

    Args:
        dynamic: the UNet with the task as an input.
        model: what it was exported from.
        work: gets a folder for each task.
        progress: told of each task and edit.
        edits: the user's own passes, run on the graph of each task.

    Raises:
        PassError: the routing cannot be specialised, or an edit does not hold; names the node, or the edit.
    """
    specialised = {}
    height, width = model.latent_size
    for task in model.tasks:
        task_id = model.task_id(task)
        context = passes.PassContext(
            task_id,
            channels=model.channels(task),
            batch=task.unet_batch,
            height=height,
            width=width,
            text_length=model.text_length,
        )
        graph = work / task.name / "model.onnx"
        with progress.stage(f"passes {task.name}"):
            done = passes.run_pipeline(dynamic, graph, passes.TASK_PIPELINE, context)
        records: list[bundle.UserPassRecord] = []
        for edit in edits:
            with progress.stage(f"{edit.id} {task.name}"):
                edited = graph.with_name(f"edited-{len(records) + 1}.onnx")
                result = passes.run_user_pass(edit, graph, edited)
            # Graphs are as large as the model: the one before an edit is not needed any more.
            graph.unlink()
            graph.with_name(f"{graph.name}.data").unlink(missing_ok=True)
            graph = edited
            records.append(bundle.UserPassRecord(**asdict(result)))
        specialised[task.name] = Specialised(task_id, task, graph, pass_records(done), tuple(records))
    return specialised


def pass_records(done: Sequence[passes.PassResult]) -> tuple[bundle.PassRecord, ...]:
    """Only what a manifest keeps: a result holds the graph."""
    return tuple(bundle.PassRecord(result.id, result.changed, result.rewrites) for result in done)
