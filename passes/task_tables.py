"""Tables with a row for each task, of which a graph reads those of its samples' tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mtu_compile.graph.edit import TASK, Array, add_constant, attribute, constant, produced_by


@dataclass(frozen=True, eq=False)
class TaskTable:
    """A value that is a row of a table for each sample.

    Attributes:
        rows: [T, …].
        task: the graph's input that selects them, [batch].
    """

    rows: Array
    task: ir.Value


def read_table(value: ir.Value | None) -> TaskTable | None:
    """``value`` as ``Gather(table, task)``; ``None`` if it is something else."""
    node = produced_by(value, "Gather")
    if node is None or attribute(node, "axis", 0) != 0:
        return None
    rows, task = constant(node.inputs[0]), node.inputs[1]
    if rows is None or task is None or not task.is_graph_input() or task.name != TASK:
        return None
    return TaskTable(rows, task)


def add_table(graph: ir.Model, name: str, rows: Array, task: ir.Value) -> ir.Value:
    """Rows of a table, one for each sample; the same constant for every sample where the tasks do not differ.

    Args:
        graph: gets the table and the node that reads it, in front of all others.
        name: of the table; the node is called ``<name>/Gather``.
        rows: [T, …].
        task: the graph's input, [batch].

    Returns:
        [batch, …], or [1, …] where all rows are equal.
    """
    if (rows == rows[:1]).all():
        return add_constant(graph, name, rows[:1])
    table = add_constant(graph, name, rows)
    node = ir.node("Gather", [table, task], attributes={"axis": 0}, name=f"{table.name}/Gather")
    (gathered,) = node.outputs
    gathered.name = f"{table.name}.of_task"
    gathered.type = table.type
    assert task.shape is not None
    gathered.shape = ir.Shape([task.shape[0], *rows.shape[1:]])
    graph.graph.insert_before(graph.graph[0], node)
    return gathered


def repeated(rows: Array, times: int) -> Array:
    """[T] → [T, 1, times]: one number a task for each of several channels."""
    return np.repeat(rows.reshape(-1, 1, 1), times, axis=-1)
