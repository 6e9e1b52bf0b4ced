"""A shared UNet's ONNX graph as one of its tasks sees it, for tools that know no input ``task``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import ModelError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import SAMPLE, TASK, add_constant, find_input, replace_value


def bind_onnx(graph: Path, out: Path, *, task_id: int, channels: int) -> None:
    """Write ``graph`` with its task fixed to the file ``out``.

    *Given*::

        sample [batch, 9, h, w], task [batch]

    *Result*, for a task of 4 channels::

        sample [batch, 4, h, w]                    # Pad: the channels the task does not have are zero
        task   [1], a constant, which every sample reads

    Tables keep the rows of the other tasks: they are small, and compilers drop them.

    Args:
        graph: of all tasks, with an input ``task``.
        out: file of an existing folder.
        task_id: the task's row.
        channels: of the noisy latent and the task's condition.

    Raises:
        ModelError: ``graph`` is unreadable, has no such input, or has fewer channels than the task.
    """
    model = graph_io.load(graph)
    task, sample = find_input(model, TASK), find_input(model, SAMPLE)
    if task is None or sample is None or sample.shape is None:
        raise ModelError(f"{graph.name} has no inputs {SAMPLE!r} and {TASK!r}", hint="is it a shared bundle's UNet?")
    batch, width, *size = sample.shape
    if not isinstance(width, int) or width < channels:
        raise ModelError(f"{graph.name} takes {width} channels, and the task has {channels}")
    inputs = model.graph.inputs
    row = add_constant(model, "mtu.task", np.full(1, task_id, np.int64))
    replace_value(task, row)
    inputs.remove(task)
    if width > channels:
        narrow = ir.Value(name=SAMPLE, type=sample.type, shape=ir.Shape([batch, channels, *size]))
        pads = add_constant(model, "mtu.channels", np.array([0, 0, 0, 0, 0, width - channels, 0, 0], np.int64))
        pad = ir.node("Pad", [narrow, pads], attributes={"mode": "constant"}, name="task_conv_in/Pad")
        (padded,) = pad.outputs
        padded.name, padded.type, padded.shape = "task_conv_in.padded", sample.type, sample.shape
        replace_value(sample, padded)
        inputs[list(inputs).index(sample)] = narrow
        model.graph.insert_before(model.graph[0], pad)
    graph_io.check(model, "binding the task")
    graph_io.save(model, out)
