"""Experts whose gates are rows of tables become one feed-forward with gates on its hidden vector."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mtu_compile.graph.edit import constant, constant_tensor, in_float64, read_float64
from passes.experts import Mixture
from passes.merged_weights import FeedForward, part_of, put_in_place
from passes.task_tables import TaskTable, add_table, read_table, repeated


def gate_tables(mixture: Mixture) -> tuple[TaskTable, ...] | None:
    """The gates' tables of one number a task, if at least one gate is such a table and the others are constants."""
    tables = [read_table(expert.gate) for expert in mixture.experts]
    known = next((table for table in tables if table is not None), None)
    if known is None or len({expert.approximate for expert in mixture.experts}) > 1:
        return None
    complete = []
    for expert, table in zip(mixture.experts, tables, strict=True):
        if table is None:
            gate = constant(expert.gate)
            if gate is None or gate.size != 1:
                return None
            table = TaskTable(np.repeat(gate.reshape(1), len(known.rows)), known.task)
        if table.rows.size != len(known.rows):
            return None
        complete.append(table)
    return tuple(complete)


def merge_gated(graph: ir.Model, mixture: Mixture, tables: Sequence[TaskTable]) -> int:
    """Merge experts whose gates depend on the task; 1, the number of mixtures rewritten.

    *Given*, for N experts (x_i the same for all, or one for each)::

        e_i = Add(MatMul(GEGLU(Add(MatMul(x_i, up_i), up_bias_i)), down_i), down_bias_i)
        y = Mul(e_0, table_0[task]) + … + Mul(e_{N-1}, table_{N-1}[task])

    *Result*::

        value, gate = Split(Add(MatMul(x, up), up_bias))
        y = Add(MatMul(Mul(Mul(value, gates[task]), Gelu(gate)), down), bias[task])

    If the x_i differ there is a GEGLU for each, and the gates multiply all of them, side by side.

        up, down = the experts' weights side by side
        gates[t] = table_i[t] for each hidden channel of expert i, for all i
        bias[t]  = sum of table_i[t] · down_bias_i
    """
    experts, task = mixture.experts, tables[0].task
    parts = [part_of(expert, 1.0, expert.x) for expert in experts]
    approximate, dtype = experts[0].approximate, parts[0].up.dtype.numpy()
    merged = FeedForward(graph, experts[0].scope)
    gates = [
        repeated(in_float64(table.rows), int(part.down.shape.numpy()[0]))
        for table, part in zip(tables, parts, strict=True)
    ]
    gate = add_table(graph, f"{experts[0].scope}.gates", np.concatenate(gates, axis=-1).astype(dtype), task)
    if len({part.source for part in parts}) == 1:
        hidden = merged.geglu(merged.up(parts, parts[0].source), approximate, gate)
    else:
        hiddens = [
            merged.geglu(merged.up([part], part.source, f"experts.{i}.net.0.proj"), approximate)
            for i, part in enumerate(parts)
        ]
        (hidden,) = merged.add("Concat", "net.0", *hiddens, axis=-1)
        (hidden,) = merged.add("Mul", "net.1", hidden, gate)
    output = merged.down(parts, hidden)
    bias = add_table(graph, f"{experts[0].scope}.net.2.bias", _biases(mixture, tables).astype(dtype), task)
    (output,) = merged.add("Add", "net.2", output, bias)
    put_in_place(graph, mixture, merged, output)
    return 1


def _biases(mixture: Mixture, tables: Sequence[TaskTable]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """[T, 1, C]: what the experts' down projections add for each task."""
    total = np.zeros((len(tables[0].rows), 1, 1))
    for expert, table in zip(mixture.experts, tables, strict=True):
        tensor = constant_tensor(expert.down_bias)
        if tensor is not None:
            total = total + in_float64(table.rows).reshape(-1, 1, 1) * read_float64(tensor).reshape(1, 1, -1)
    return total
