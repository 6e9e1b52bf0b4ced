"""What the passes are told of a model: the sizes of its graphs, for one task and for all."""

from __future__ import annotations

from dataclasses import replace

from mtu_compile.core.tasks import Task
from mtu_compile.stages.job import Model
from passes import PassContext


def task_context(model: Model, task: Task) -> PassContext:
    """For the static graph of one task."""
    height, width = model.latent_size
    return PassContext(
        model.task_id(task),
        channels=model.channels(task),
        batch=task.unet_batch,
        height=height,
        width=width,
        text_length=model.text_length,
    )


def shared_context(model: Model, batch: int | None = None) -> PassContext:
    """For the graph of all tasks; without ``batch``, any number of samples a step."""
    return replace(task_context(model, model.tasks[0]), task_id=None, channels=None, batch=batch)
