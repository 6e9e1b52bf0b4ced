"""Static in everything but the batch: what two frozen copies of a graph agree on, and where they follow the batch.

Symbolic shape inference would have to be trusted. Two copies frozen for two batches need no trust: a size that is the
same in both is static, one that grows with the batch is the batch, and a constant that differs was computed from it.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import BATCH, add_constant, constant_tensor, replace_value, static_shape
from passes.folding import SMALL
from passes.plain_attention import merge_transpositions

#: The sizes the batch has in the two copies: not 1, which broadcasts.
WITNESSES = (2, 3)

_HINT = "only what does the same with each sample can keep its batch free"


def drop_expansions(graph: ir.Model) -> bool:
    """Let values that are repeated once for each sample (the timestep) broadcast instead; whether there were any."""
    found = False
    for node in list(graph.graph):
        source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type != "Expand" or source is None or output.is_graph_output():
            continue
        before, after = static_shape(source), static_shape(output)
        if len(before) == len(after) and before[0] == 1 < after[0] and before[1:] == after[1:]:
            replace_value(output, source)
            graph.graph.remove(node, safe=True)
            found = True
    return found


def free_batch(graph: ir.Model, twin: ir.Model) -> None:
    """Free the batch of ``graph``, frozen for the first of the witnesses, by comparing it with its twin, frozen for the
    second.

    *Given*::

        y = Reshape(x, [2, -1, 64])               # in the twin: [3, -1, 64]
        k = Reshape(Transpose<0, 2, 1>(Reshape(x, [-1, 9, 16])), [2, 4, 16, 9])

    *Result*::

        y = Reshape(x, [0, 9, 64])
        k = Transpose<0, 1, 3, 2>(x)

    Raises:
        PassError: a node computes with the number of samples in a way that this does not free.
    """
    for model in (graph, twin):
        merge_transpositions(model)
    if len(graph.graph) != len(twin.graph):
        raise PassError("the graph's nodes depend on the number of samples", hint=_HINT)
    shapes: dict[ir.Value, list[int | str]] = {}
    for ours, theirs in zip(graph.graph.inputs, twin.graph.inputs, strict=True):
        shapes[ours] = _common(ours, theirs, ours.name)
    for node, other in zip(graph.graph, twin.graph, strict=True):
        if node.op_type != other.op_type:
            raise PassError(f"node {node.name!r} depends on the number of samples", hint=_HINT)
        for ours, theirs in zip(node.outputs, other.outputs, strict=True):
            if ours.name:
                shapes[ours] = _common(ours, theirs, node.name)
    targets: dict[tuple[int, ...], ir.Value] = {}
    for node, other in zip(graph.graph, twin.graph, strict=True):
        if node.op_type == "Reshape" and constant_tensor(node.inputs[1]) is not None:
            _free_target(graph, node, shapes, targets)
        else:
            _require_same_constants(node, other)
    for value, shape in shapes.items():
        value.shape = ir.Shape(shape)


def _common(ours: ir.Value, theirs: ir.Value, place: str | None) -> list[int | str]:
    """The shape of a value in terms of the batch."""
    first, second = static_shape(ours), static_shape(theirs)
    if len(first) != len(second) or (not first and (ours.shape is None or len(ours.shape))):
        raise PassError(f"value {ours.name!r} (node {place!r}) has no static shape for a given batch")
    common: list[int | str] = []
    for a, b in zip(first, second, strict=True):
        times = Fraction(a, WITNESSES[0])
        if a == b:
            common.append(a)
        elif times == Fraction(b, WITNESSES[1]) and times.denominator == 1:
            common.append(BATCH if times == 1 else f"{times}*{BATCH}")
        else:
            raise PassError(f"{place!r}: a size of {ours.name!r} is no multiple of the batch", hint=_HINT)
    return common


def _free_target(
    graph: ir.Model,
    node: ir.Node,
    shapes: dict[ir.Value, list[int | str]],
    targets: dict[tuple[int, ...], ir.Value],
) -> None:
    """Write a Reshape's target with 0 (as the input has it) or -1 (what is left) for the batch."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    before = shapes.get(source) or list(static_shape(source))
    target = [
        size if isinstance(size, int) else 0 if axis < len(before) and before[axis] == size else -1
        for axis, size in enumerate(shapes[output])
    ]
    if target.count(-1) > 1:
        raise PassError(f"node {node.name!r} gives two dimensions a size that depends on the batch", hint=_HINT)
    if all(isinstance(size, int) for size in shapes[output]):
        return
    key = tuple(target)
    if key not in targets:
        targets[key] = add_constant(graph, f"{node.name}.shape", np.array(target, np.int64))
    node.replace_input_with(1, targets[key])
    node.attributes.pop("allowzero", None)


def _require_same_constants(node: ir.Node, other: ir.Node) -> None:
    for ours, theirs in zip(node.inputs, other.inputs, strict=True):
        left, right = constant_tensor(ours), constant_tensor(theirs)
        if (left is None) != (right is None):
            raise PassError(f"node {node.name!r} depends on the number of samples", hint=_HINT)
        if left is None or right is None or left is right or max(left.size, right.size) > SMALL:
            continue
        if left.shape != right.shape or not np.array_equal(left.numpy(), right.numpy()):
            raise PassError(f"{node.op_type} node {node.name!r} computes with the number of samples", hint=_HINT)
