"""``mtu::tabulate-tasks``: any task still, but no router: what a task decides is a row of a table."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import (
    BOUND_TASK,
    SAMPLE,
    TASK,
    TASK_IDS,
    add_constant,
    constant_tensor,
    find_input,
    remove_unused,
    replace_value,
    users,
)
from passes.base import PassContext, PassResult, Skipped
from passes.constants import Evaluator
from passes.routed_conv import RoutedConv, find_routed_conv
from passes.task_tables import add_table
from passes.task_values import decided_by, require_task_gates, take_batch_from


class TabulateTasks:
    """Compute for every task what it decides, and read the rows of the samples' tasks.

    *Given*::

        task_ids [batch]
        gates = Softmax(Gemm(Relu(Gemm(Gather(task_embedding, task_ids)))))
        x = Add(Mul(norm, Gather(gamma, task_ids)), Gather(beta, task_ids))
        y = Conv(Concat(Mul(slot_0, one_hot[:, 0]), …, Mul(slot_3, one_hot[:, 3])), weight)

    *Result*::

        task [batch]
        weighted_i = Mul(expert_i, Gather(table_i, task))
        x = Add(Mul(norm, Gather(table, task)), Gather(table, task))
        y = Conv(Mul(Concat(slot_0, …, slot_3), Gather(mask, task)), weight)

    The samples of one batch may be of different tasks. A table whose rows are all equal becomes a constant.

    Fires on a graph with an input ``task_ids``; does not fire on one without: a plain UNet, or one bound to a task.
    Refuses (``PassError``, naming the node) a gate that depends on anything but the task, as ``mtu::fold-routing``.
    """

    id = "mtu::tabulate-tasks"
    after: tuple[str, ...] = ()

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        if find_input(graph, TASK_IDS) is not None and find_input(graph, SAMPLE) is None:
            raise PassError(f"the graph has no input {SAMPLE!r}")

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        task = find_input(graph, TASK_IDS)
        if task is None:
            return PassResult(self.id, graph, 0, (Skipped(TASK_IDS, "the graph has no such input"),))
        sample = find_input(graph, SAMPLE)
        assert sample is not None
        count = _count_tasks(task)
        take_batch_from(sample, task)
        # With a sample of each task in the place of the batch, what the task decides comes out as its table.
        bound = add_constant(graph, BOUND_TASK, np.arange(count, dtype=np.int64))
        replace_value(task, bound)
        evaluator = Evaluator(graph)
        require_task_gates(graph, evaluator)
        _mask_slots(graph, find_routed_conv(graph, sample, evaluator), task, evaluator)
        remove_unused(graph)
        decided = decided_by(graph, bound, evaluator)
        for value in decided:
            rows = evaluator.array(value)
            assert rows is not None
            if rows.shape[:1] != (count,):
                raise PassError(f"value {value.name!r} is not one of each task: it is of shape {list(rows.shape)}")
            replace_value(value, add_table(graph, f"{value.name}.rows", rows, task))
        task.name = TASK
        remove_unused(graph)
        return PassResult(self.id, graph, len(decided) + 1)

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        if BOUND_TASK in graph.graph.initializers or find_input(graph, TASK_IDS) is not None:
            raise PassError(f"{self.id} left nodes that compute what the task decides")


def _count_tasks(task: ir.Value) -> int:
    """Rows of the task embedding."""
    for node in users(task):
        tensor = constant_tensor(node.inputs[0]) if node.op_type == "Gather" else None
        if tensor is not None and node.inputs[1] is task:
            return int(tensor.shape.numpy()[0])
    raise PassError(
        f"nothing looks {TASK_IDS!r} up in a table of task embeddings",
        hint="the graph has to be exported by mtu_compile.model.export.export_unet",
    )


def _mask_slots(graph: ir.Model, routed: RoutedConv, task: ir.Value, evaluator: Evaluator) -> None:
    """One multiplication for all slots instead of one for each, and the convolution is called as in a task's graph."""
    conv, masks = routed.conv, []
    for slot in routed.slots:
        gate = evaluator.array(slot.gate)
        if gate is None or gate.size != gate.shape[0]:
            raise PassError(f"node {conv.name!r} gates its input by channel, not by task")
        masks.append(np.repeat(gate.reshape(-1, 1, 1, 1), slot.channels, axis=1))
    mask = add_table(graph, "conv_in.mask", np.concatenate(masks, axis=1), task)
    slots = ir.node("Concat", [slot.part for slot in routed.slots], attributes={"axis": 1}, name="conv_in/Concat")
    masked = ir.node("Mul", [slots.outputs[0], mask], name="conv_in/Mul")
    slots.outputs[0].name, masked.outputs[0].name = "conv_in.slots", "conv_in.masked"
    graph.graph.insert_before(conv, [slots, masked])
    conv.replace_input_with(0, masked.outputs[0])
    weight = evaluator.array(conv.inputs[1])  # type: ignore[arg-type]
    assert weight is not None  # the tasks' weights side by side: quantisation wants one constant
    conv.replace_input_with(1, add_constant(graph, "conv_in.weight", weight))
    conv.name = "conv_in/Conv"
