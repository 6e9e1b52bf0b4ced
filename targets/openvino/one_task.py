"""A shared UNet's IR as one of its tasks sees it, for tools that know no input ``task``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
from openvino import opset13 as ops

from mtu_compile.core.errors import BuildError, ModelError
from targets.openvino.engine import reason
from targets.openvino.ir import read_graph, write_ir


def bind_ir(graph: Path, folder: Path, *, task_id: int, channels: int, batch: int) -> Path:
    """Write ``graph`` with its task fixed into the existing ``folder``; see ``mtu_compile.graph.one_task.bind_onnx``.

    Weights stay as they are stored: nothing is folded, OpenVINO does that when it compiles.

    Args:
        graph: IR of all tasks, with an input ``task``.
        folder: gets ``openvino_model.xml`` and ``.bin``.
        task_id: the task's row.
        channels: of the noisy latent and the task's condition.
        batch: samples of a step. The shared graph may have been built for one at a time, or for any number.

    Returns:
        The path of the former.

    Raises:
        ModelError: ``graph`` has no such input, or fewer channels than the task.
        BuildError: OpenVINO cannot read or write it, or it does not take so many samples.
    """
    model = read_graph(graph)
    named = {name: port for port in model.inputs for name in port.names}
    if not {"task", "sample"} <= named.keys():
        raise ModelError(f"{graph.name} has no inputs 'sample' and 'task'", hint="is it a shared bundle's UNet?")
    task, sample = named["task"], named["sample"]
    samples, width, *size = sample.partial_shape
    if width.is_dynamic or width.get_length() < channels:
        raise ModelError(f"{graph.name} takes {width} channels, and the task has {channels}")
    parameters = [node for node in model.get_parameters() if node != task.get_node()]
    _read_instead(task, ops.constant(np.full(1, task_id, np.int64), task.get_element_type()).output(0))
    if (missing := width.get_length() - channels) > 0:
        shape = openvino.PartialShape([samples, openvino.Dimension(channels), *size])
        narrow = ops.parameter(shape, sample.get_element_type(), "sample")
        zero = ops.constant(0, sample.get_element_type())
        padded = ops.pad(narrow, [0, 0, 0, 0], [0, missing, 0, 0], "constant", zero)
        parameters[parameters.index(sample.get_node())] = narrow
        _read_instead(sample, padded.output(0))
        sample.get_tensor().set_names(set())
        narrow.output(0).get_tensor().set_names({"sample"})
    bound = openvino.Model(model.get_results(), parameters, model.get_friendly_name())
    _set_batch(bound, batch)
    return write_ir(bound, folder, fp16_weights=False)


def _set_batch(model: openvino.Model, batch: int) -> None:
    """Let every input but the timestep, and so the output, have so many samples."""
    shapes = {port: [batch, *list(port.partial_shape)[1:]] for port in model.inputs if len(port.partial_shape) > 1}
    try:
        model.reshape(shapes)
    except RuntimeError as error:
        raise BuildError(f"the shared graph does not take {batch} samples: {reason(error)}") from error
    if model.output(0).partial_shape[0] != openvino.Dimension(batch):
        raise BuildError(f"the shared graph does not take {batch} samples: it answers {model.output(0).partial_shape}")


def _read_instead(old: object, new: object) -> None:
    """Let whoever reads the value ``old`` read ``new``."""
    for port in old.get_target_inputs():  # type: ignore[attr-defined]
        port.replace_source_output(new)
