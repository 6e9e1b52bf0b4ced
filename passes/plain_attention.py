"""``mtu::plain-attention``: queries are scaled, keys are transposed, and each of that happens once."""

from __future__ import annotations

import onnx_ir as ir

from mtu_compile.graph.edit import (
    add_constant,
    attribute,
    constant,
    constant_tensor,
    in_float64,
    only_user,
    produced_by,
    replace_value,
    static_shape,
)
from passes.base import TASK_PIPELINE, PassContext, PassResult


class PlainAttention:
    """Write the scores of attention as compilers look for them.

    *Given*, as PyTorch's exporter writes ``scaled_dot_product_attention``::

        q = Transpose<perm=[0, 2, 1, 3]>(queries); k = Transpose<perm=[0, 2, 1, 3]>(keys)
        turned = Reshape(Transpose<perm=[0, 2, 1]>(Reshape(k)))         # batch and heads are one dimension in between
        scores = Softmax(MatMul(Mul(q, root), Mul(turned, root)))       # root: the head's width to the -1/4

    *Result*::

        q = Transpose<perm=[0, 2, 1, 3]>(queries); k = Transpose<perm=[0, 2, 3, 1]>(keys)
        scores = Softmax(MatMul(Mul(q, scale), k))

    Keys are moved once, and a multiplication as large as they are goes. Two factors that become one round once less:
    the scores differ by a rounding of float32. Does not fire on a MatMul whose result no Softmax reads alone, on
    factors that are not single numbers, on transposed values that something else reads too, nor where sizes are
    unknown.
    """

    id = "mtu::plain-attention"
    after: tuple[str, ...] = TASK_PIPELINE[: TASK_PIPELINE.index("mtu::plain-attention")]

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        pass

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        rewrites = merge_transpositions(graph)
        for node in list(graph.graph):
            if node.op_type == "MatMul" and only_user(node.outputs[0], "Softmax") is not None:
                rewrites += _scale_once(graph, node)
        for node in list(graph.graph):
            if node.op_type == "Transpose":
                rewrites += _transpose_once(graph, node)
        return PassResult(self.id, graph, rewrites)

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        pass


def _scale_once(graph: ir.Model, scores: ir.Node) -> int:
    """Leave the keys as they are, and let the queries take both factors."""
    queries, keys = (_factor(value) for value in scores.inputs)
    if queries is None or keys is None:
        return 0
    (query, number), (key, other) = queries, keys
    scaled = query.outputs[0]
    if len(scaled.uses()) != 1 or scaled.is_graph_output():
        return 0
    of_query, of_key = constant(query.inputs[number]), constant(key.inputs[other])
    assert of_query is not None
    assert of_key is not None
    both = (in_float64(of_query) * of_key).astype(of_query.dtype)
    query.replace_input_with(number, add_constant(graph, f"{query.name}.scale", both))
    scores.replace_input_with(1, key.inputs[1 - other])
    if not key.outputs[0].uses() and not key.outputs[0].is_graph_output():
        graph.graph.remove(key, safe=True)
    return 1


def _factor(value: ir.Value | None) -> tuple[ir.Node, int] | None:
    """The Mul that makes ``value``, and which of its inputs is a single number."""
    node = produced_by(value, "Mul")
    if node is None:
        return None
    for at, operand in enumerate(node.inputs):
        tensor, other = constant_tensor(operand), constant_tensor(node.inputs[1 - at])
        if tensor is not None and tensor.size == 1 and len(tensor.shape) <= 1 and other is None:
            return node, at
    return None


def _transpose_once(graph: ir.Model, node: ir.Node) -> int:
    """Transpose what the Transpose before ``node`` reads, if nobody else wants that one's result."""
    before = produced_by(node.inputs[0], "Transpose")
    if before is None or only_user(before.outputs[0], "Transpose") is None:
        return 0
    first, second = attribute(before, "perm", None), attribute(node, "perm", None)
    if first is None or second is None:
        return 0
    node.replace_input_with(0, before.inputs[0])
    node.attributes["perm"] = ir.AttrInt64s("perm", [first[axis] for axis in second])
    graph.graph.remove(before, safe=True)
    return 1


def merge_transpositions(graph: ir.Model) -> int:
    """Write a transposition of the last axes, which the exporter surrounds with Reshapes, as one over all axes.

    In between, batch and heads are one dimension. Returns how many there were.
    """
    found = 0
    for node in list(graph.graph):
        if node.op_type != "Transpose":
            continue
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        after = only_user(node.outputs[0], "Reshape")
        if before is None or before.op_type != "Reshape" or after is None:
            continue
        source, output, order = before.inputs[0], after.outputs[0], attribute(node, "perm", None)
        assert source is not None
        sizes, split = static_shape(source), static_shape(output)
        merged = static_shape(before.outputs[0])
        extra = len(sizes) - len(merged)
        if order is None or order[0] != 0 or extra < 1 or constant(after.inputs[1]) is None:
            continue
        perm = [*range(extra + 1), *(axis + extra for axis in order[1:])]
        if sizes[extra + 1 :] != merged[1:] or split != [sizes[axis] for axis in perm]:
            continue
        whole = ir.node("Transpose", [source], attributes={"perm": perm}, name=node.name)
        (whole.outputs[0].name, node.name) = (f"{node.outputs[0].name}.whole", f"{node.name}.merged")
        whole.outputs[0].shape, whole.outputs[0].type = output.shape, output.type
        graph.graph.insert_before(after, whole)
        replace_value(output, whole.outputs[0])
        graph.graph.remove([after, node], safe=True)
        if not before.outputs[0].uses() and not before.outputs[0].is_graph_output():
            graph.graph.remove(before, safe=True)
        found += 1
    return found
