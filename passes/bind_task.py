"""``mtu::bind-task``: one task instead of any."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import (
    BOUND_TASK,
    SAMPLE,
    TASK_IDS,
    Array,
    add_constant,
    attribute,
    constant_tensor,
    find_input,
    in_float64,
    only_user,
    other_input,
    remove_unused,
    replace_value,
    users,
)
from passes.base import PassContext, PassResult, Skipped
from passes.constants import Evaluator
from passes.routed_conv import RoutedConv, Slot, find_routed_conv
from passes.task_values import take_batch_from


class BindTask:
    """Replace the input ``task_ids`` by one task, and the routed input convolution by that task's own.

    *Given* (four tasks; ``one_hot`` computed from ``task_ids``)::

        sample [batch, 9, height, width], task_ids [batch]
        slot_0 = Mul(Slice(sample, 0:4), one_hot[:, 0])  …  slot_3 = Mul(sample, one_hot[:, 3])
        y = Add(Conv(Concat(slot_0, …, slot_3), weight), bias_of_task)

    *Result* (for a task that reads ``channels`` = 8)::

        sample [batch, 8, height, width]
        y = Conv(sample, weight of the task's slot, bias of the task)

    and every other reader of ``task_ids`` reads a constant of shape [1], which broadcasts over the batch. Where the
    exporter took the size of the batch from ``task_ids``, it is taken from ``sample``.

    Fires on a graph with an input ``task_ids``. Does not fire on one without: a plain UNet, or one bound already.
    Refuses (``PassError``): a task id the graph's tables do not have; ``channels`` other than what the task reads;
    another reader of ``sample`` than the routed convolution, because narrowing would change what it sees.
    """

    id = "mtu::bind-task"
    after: tuple[str, ...] = ()

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        if find_input(graph, TASK_IDS) is None:
            return
        if context.task_id is None or context.channels is None:
            raise PassError(f"{self.id} needs a task id and the number of channels the task reads")
        if context.task_id < 0:
            raise PassError(f"task id {context.task_id} is negative")
        sample = find_input(graph, SAMPLE)
        if sample is None or sample.shape is None or len(sample.shape) != 4:
            raise PassError(f"the graph has no input {SAMPLE!r} of shape [batch, channels, height, width]")

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        task_ids = find_input(graph, TASK_IDS)
        if task_ids is None:
            return PassResult(self.id, graph, 0, (Skipped(TASK_IDS, "the graph has no such input"),))
        assert context.task_id is not None and context.channels is not None
        sample = find_input(graph, SAMPLE)
        assert sample is not None
        take_batch_from(sample, task_ids)
        bound = add_constant(graph, BOUND_TASK, np.array([context.task_id], dtype=np.int64))
        replace_value(task_ids, bound)
        graph.graph.inputs.remove(task_ids)
        evaluator = Evaluator(graph)
        routed = find_routed_conv(graph, sample, evaluator)
        _bind_conv(graph, routed, sample, context.channels, evaluator)
        remove_unused(graph)
        _narrow(sample, context.channels, routed.conv)
        return PassResult(self.id, graph, 2)

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        if find_input(graph, TASK_IDS) is not None:
            raise PassError(f"{self.id} left the input {TASK_IDS!r} in the graph")


def _bind_conv(graph: ir.Model, routed: RoutedConv, sample: ir.Value, channels: int, evaluator: Evaluator) -> None:
    conv = routed.conv
    weight = evaluator.array(conv.inputs[1])  # type: ignore[arg-type]
    assert weight is not None
    used = [(slot, _scalar(slot, conv, evaluator)) for slot in routed.slots]
    if weight.shape[1] != sum(slot.channels for slot in routed.slots) or attribute(conv, "group", 1) != 1:
        raise PassError(f"node {conv.name!r} is not a convolution over all tasks' slots")
    reads = max((slot.channels for slot, gate in used if gate), default=0)
    if reads != channels:
        raise PassError(
            f"the task reads {reads} channels of {SAMPLE!r}, not {channels}",
            hint="does the model have a task with this id?" if not reads else None,
        )
    bound = np.zeros((weight.shape[0], channels, *weight.shape[2:]))
    start = 0
    for slot, gate in used:
        if gate:
            bound[:, : slot.channels] += gate * in_float64(weight[:, start : start + slot.channels])
        start += slot.channels
    bias, output = _bias(conv, evaluator)
    values = [sample, add_constant(graph, "conv_in.weight", bound.astype(weight.dtype))]
    if bias is not None:
        values.append(add_constant(graph, "conv_in.bias", bias.astype(weight.dtype)))
    attributes = [a for a in conv.attributes.values() if not a.is_ref()]
    node = ir.Node("", "Conv", values, attributes, name="conv_in/Conv")
    node.outputs[0].name = "conv_in"
    node.outputs[0].shape, node.outputs[0].type = output.shape, output.type
    graph.graph.insert_before(conv, node)
    replace_value(output, node.outputs[0])


def _scalar(slot: Slot, conv: ir.Node, evaluator: Evaluator) -> float:
    gate = evaluator.array(slot.gate)
    if gate is None or gate.size != 1:
        raise PassError(f"node {conv.name!r} gates its input by channel, not by task")
    return float(gate.item())


def _bias(conv: ir.Node, evaluator: Evaluator) -> tuple[Array | None, ir.Value]:
    """Everything constant that is added to the convolution, as [out channels], and the value after that."""
    own = evaluator.array(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else None
    bias = None if own is None else in_float64(own)
    output = conv.outputs[0]
    add = only_user(output, "Add")
    added = evaluator.array(other_input(add, output)) if add is not None else None  # type: ignore[arg-type]
    channels = constant_tensor(conv.inputs[1])
    if add is not None and added is not None and channels is not None and added.shape == (1, channels.shape[0], 1, 1):
        output = add.outputs[0]
        task_bias = in_float64(added).reshape(-1)
        bias = task_bias if bias is None else bias + task_bias
    return bias, output


def _narrow(sample: ir.Value, channels: int, conv: ir.Node) -> None:
    """Shrink the input, once nothing but the bound convolution looks at its channels."""
    assert sample.shape is not None
    for node in users(sample):
        bound_conv = node.op_type == "Conv" and node.name == "conv_in/Conv"
        rank = len(sample.shape)
        start, end = attribute(node, "start", 0), attribute(node, "end", rank)
        sizes = node.op_type == "Shape" and not (start % rank) <= 1 < (end if end >= 0 else end + rank)
        if not bound_conv and not sizes:
            raise PassError(f"node {node.name!r} reads {SAMPLE!r} too, so it cannot be narrowed to one task")
    batch, _, height, width = sample.shape
    sample.shape = ir.Shape([batch, channels, height, width])
