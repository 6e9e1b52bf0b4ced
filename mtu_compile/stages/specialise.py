"""From the UNet with the task as an input to the static graph of each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import passes
from mtu_compile import bundle
from mtu_compile.core.progress import Progress
from mtu_compile.stages.job import Model, Specialised


def specialise(dynamic: Path, model: Model, work: Path, progress: Progress) -> dict[str, Specialised]:
    """By task of ``model``, its graph in a folder of ``work``: the same for every target.

    Raises:
        PassError: the routing cannot be specialised; names the node.
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
        specialised[task.name] = Specialised(task_id, task, graph, pass_records(done))
    return specialised


def pass_records(done: Sequence[passes.PassResult]) -> tuple[bundle.PassRecord, ...]:
    """Only what a manifest keeps: a result holds the graph."""
    return tuple(bundle.PassRecord(result.id, result.changed, result.rewrites) for result in done)
