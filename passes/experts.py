"""Finds mixtures of experts: GEGLU feed-forwards whose outputs are multiplied by a gate and added up."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import (
    TASK_IDS,
    constant_tensor,
    find_input,
    only_user,
    other_input,
    produced_by,
    remove_unused,
    scope,
)
from passes.base import PassResult, Skipped


@dataclass(frozen=True, eq=False)
class Expert:
    """One gated feed-forward, ``gate · (GEGLU(x · up + up_bias) · down + down_bias)``.

    Attributes:
        x: what it reads, [..., C].
        up: weight [C, 2h], value half first, and its bias [2h] (or ``None``).
        down: weight [h, C] and its bias [C] (or ``None``).
        gate: what its output is multiplied by.
        approximate: the kind of Gelu, as its attribute says.
        output: the gated output.
        up_node: the first node, for messages and names.
    """

    x: ir.Value
    up: ir.Value
    up_bias: ir.Value | None
    down: ir.Value
    down_bias: ir.Value | None
    gate: ir.Value
    approximate: str
    output: ir.Value
    up_node: ir.Node

    @property
    def scope(self) -> str:
        """The feed-forward this expert is a part of, by module path."""
        return re.sub(r"\.experts\.\d+\..*", "", scope(self.up_node))


@dataclass(frozen=True, eq=False)
class Mixture:
    """Experts whose gated outputs are added up.

    Attributes:
        experts: in the order of the graph.
        output: the sum.
    """

    experts: tuple[Expert, ...]
    output: ir.Value

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self.experts[0].scope or (self.experts[0].up_node.name or "")


def find_mixtures(graph: ir.Model) -> tuple[Mixture, ...]:
    """All mixtures of the graph, in its order.

    *Given*, for each expert i (the operands of ``Add`` and ``Mul`` in either order)::

        p = Add(MatMul(x, up_i), up_bias_i)          # up_bias_i may be missing
        value, gate_half = Split<axis=-1>(p)
        e = Add(MatMul(Mul(value, Gelu(gate_half)), down_i), down_bias_i)
        weighted_i = Mul(e, gate_i)

    and ``output = weighted_0 + weighted_1 + …`` in any order. An expert whose inner values are read by anything else is
    no match. A feed-forward whose output is not multiplied by anything is not an expert.
    """
    experts = [expert for node in graph.graph if node.op_type == "Gelu" and (expert := _match(node)) is not None]
    sums: dict[ir.Value, tuple[Expert, ...]] = {expert.output: (expert,) for expert in experts}
    for node in graph.graph:
        if node.op_type != "Add" or not all(v in sums for v in node.inputs):
            continue
        left, right = node.inputs
        assert left is not None and right is not None
        if left is not right and only_user(left, "Add") and only_user(right, "Add"):
            sums[node.outputs[0]] = sums.pop(left) + sums.pop(right)
    return tuple(Mixture(parts, output) for output, parts in sums.items())


def require_bound_task(graph: ir.Model) -> None:
    """``PassError`` if the task is still an input: its gates are then no constants."""
    if find_input(graph, TASK_IDS) is not None:
        raise PassError(f"the task is still an input, {TASK_IDS!r}", hint="run mtu::bind-task first")


def rewrite_mixtures(name: str, graph: ir.Model, rewrite: Callable[[Mixture], int | str]) -> PassResult:
    """Give every mixture to ``rewrite``, and remove what nothing reads then.

    Args:
        name: id of the pass.
        graph: rewritten in place.
        rewrite: returns how many places of a mixture it rewrote, or why it left the mixture as it was.
    """
    rewrites = 0
    skipped: list[Skipped] = []
    for mixture in find_mixtures(graph):
        done = rewrite(mixture)
        if isinstance(done, str):
            skipped.append(Skipped(mixture.name, done))
        else:
            rewrites += done
    remove_unused(graph)
    return PassResult(name, graph, rewrites, tuple(skipped))


def _match(gelu: ir.Node) -> Expert | None:
    gate_half = gelu.inputs[0]
    split = produced_by(gate_half, "Split")
    if split is None or len(split.outputs) != 2 or gate_half is not split.outputs[1]:
        return None
    value_half = split.outputs[0]
    product = only_user(gelu.outputs[0], "Mul")
    if product is None or other_input(product, gelu.outputs[0]) is not value_half or len(value_half.uses()) != 1:
        return None
    below = _linear_below(split.inputs[0])
    above = _linear_above(product.outputs[0])
    if below is None or above is None or gate_half is None or len(gate_half.uses()) != 1:
        return None
    up_node, up_bias = below
    down_node, down_bias, output = above
    weighted = only_user(output, "Mul")
    x, up = up_node.inputs
    down = down_node.inputs[1]
    if weighted is None or x is None or up is None or down is None:
        return None
    if not _is_weight(up) or not _is_weight(down) or not _halves(up, down):
        return None
    gate = other_input(weighted, output)
    assert gate is not None
    approximate = gelu.attributes.get_string("approximate", "none")
    return Expert(x, up, up_bias, down, down_bias, gate, approximate, weighted.outputs[0], up_node)


def _linear_below(value: ir.Value | None) -> tuple[ir.Node, ir.Value | None] | None:
    """The ``MatMul`` and bias that compute ``value``, which nothing but the caller's node may read."""
    if value is None or len(value.uses()) != 1:
        return None
    matmul = produced_by(value, "MatMul")
    if matmul is not None:
        return matmul, None
    add = produced_by(value, "Add")
    for left, right in ((0, 1), (1, 0)):
        matmul = produced_by(add.inputs[left], "MatMul") if add is not None else None
        if add is not None and matmul is not None and constant_tensor(add.inputs[right]) is not None:
            return (matmul, add.inputs[right]) if len(matmul.outputs[0].uses()) == 1 else None
    return None


def _linear_above(value: ir.Value) -> tuple[ir.Node, ir.Value | None, ir.Value] | None:
    """The ``MatMul`` and bias applied to ``value``, and the result."""
    matmul = only_user(value, "MatMul")
    if matmul is None or matmul.inputs[0] is not value:
        return None
    add = only_user(matmul.outputs[0], "Add")
    bias = other_input(add, matmul.outputs[0]) if add is not None else None
    if add is None or constant_tensor(bias) is None:
        return matmul, None, matmul.outputs[0]
    return matmul, bias, add.outputs[0]


def _is_weight(value: ir.Value) -> bool:
    tensor = constant_tensor(value)
    return tensor is not None and len(tensor.shape) == 2


def _halves(up: ir.Value, down: ir.Value) -> bool:
    assert up.const_value is not None and down.const_value is not None
    return up.const_value.shape.numpy()[1] == 2 * down.const_value.shape.numpy()[0]
