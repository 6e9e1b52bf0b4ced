"""Which nodes of a graph stay in float32 when the rest becomes half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import onnx_ir as ir

from mtu_compile.graph.edit import ancestors, constant_tensor, users

#: Finds the nodes that have to stay in float32.
Rule: TypeAlias = Callable[[ir.Model], set[ir.Node]]

FLOAT = ir.DataType.FLOAT

#: Operators that move numbers and compute nothing: they take the type that needs fewer Casts.
MOVES = frozenset(
    {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad"}
    | {"Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)

#: Inputs that are float32 whatever type the operator works in (ONNX operator specification).
FIXED_INPUTS = {"Resize": (2,)}

#: Operators that only make float32 here: their result has no input to take its type from.
SOURCES = frozenset(
    {
        "Bernoulli",
        "ConstantOfShape",
        "EyeLike",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
    | {"RandomUniformLike", "Range"}
)

QUANTISERS = ("QuantizeLinear", "DequantizeLinear")

#: Between the squares and the root of a norm.
_NORM = ("Add", "Pow", "ReduceMean", "ReduceSum", "Sqrt")

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def of_type(*op_types: str) -> Rule:
    """All nodes of some operators."""
    return lambda graph: {node for node in graph.graph if node.op_type in op_types}


def angles(graph: ir.Model) -> set[ir.Node]:
    """Sines and cosines and what their angle is computed from: 999 rad has no fraction left in half precision."""
    waves = [node for node in graph.graph if node.op_type in ("Sin", "Cos")]
    sources = ancestors(value for node in waves for value in node.inputs if value is not None)
    return {*waves, *(node for value in sources if (node := value.producer()) is not None)}


def first_layer(graph: ir.Model) -> set[ir.Node]:
    """Convolutions of a graph input: the noisy latent is not rounded, nor are their few weights."""
    return {
        node
        for node in graph.graph
        if node.op_type == "Conv" and node.inputs[0] is not None and node.inputs[0].is_graph_input()
    }


def last_layer(graph: ir.Model) -> set[ir.Node]:
    """The layer each float output comes from, and what follows it."""
    found: set[ir.Node] = set()
    for output in graph.graph.outputs:
        value: ir.Value | None = output
        while value is not None and value.dtype in (FLOAT, None) and (node := value.producer()) is not None:
            if node.op_type not in (*_LAYERS, *MOVES, "Add", "Mul"):
                break
            found.add(node)
            if node.op_type in _LAYERS:
                break
            value = next((v for v in node.inputs if v is not None and constant_tensor(v) is None), None)
    return found


def written_norms(graph: ir.Model) -> set[ir.Node]:
    """Norms written out as squares, a mean and a root: from the squares to the root."""
    found: set[ir.Node] = set()
    todo = [node for node in graph.graph if node.op_type == "Sqrt"]
    while todo:
        node = todo.pop()
        square = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
        if node in found or not (square or node.op_type in _NORM):
            continue
        found.add(node)
        if not square and node.op_type != "Pow":
            producers = (value.producer() for value in node.inputs if value is not None)
            todo += [producer for producer in producers if producer is not None]
    return found


#: What stays in float32. Of a UNet's operators these are the ones whose rounding is heard in its output, and keeping
#: them takes no more Casts than not; norms, softmax and sigmoids are computed in float32 inside by those who run them,
#: and around them it costs Casts and kernels for less than a decibel (docs/decisions/0007-precision.md). Norms and
#: softmax that are written out are another thing: squares of 256 and exponentials of 12 are beyond float16.
KEEP: Mapping[str, Rule] = {
    "angles": angles,
    "first layer": first_layer,
    "last layer": last_layer,
    "written-out norms": written_norms,
    "exponentials and sums": of_type("Exp", "ReduceL2", "ReduceSum", "ReduceSumSquare"),
}


def float_inputs(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Inputs of a node that are float32 now and could be of another type, with their places."""
    fixed = FIXED_INPUTS.get(node.op_type, ())
    return [
        (place, value)
        for place, value in enumerate(node.inputs)
        if value is not None and value.dtype == FLOAT and place not in fixed
    ]


def float_outputs(node: ir.Node) -> list[ir.Value]:
    """Outputs of a node that are float32 now."""
    return [value for value in node.outputs if value.dtype == FLOAT]


def stays_float(graph: ir.Model, keep: Iterable[ir.Node]) -> set[ir.Node]:
    """All nodes that work in float32 if those of ``keep`` do and no more than needed of the others.

    Nodes that move numbers stay when they carry float32 to a node that wants float32, so that no number goes to half
    precision and back. A QuantizeLinear takes what it is given, and a DequantizeLinear (or a Cast from integers) stays
    when everything behind it does.
    """
    nodes = [node for node in graph.graph if float_inputs(node) or float_outputs(node)]
    fixed = set(keep) | {node for node in nodes if _is_fixed(node)}
    wanted: set[ir.Node] = set()
    for node in reversed(nodes):
        if node in fixed or node.op_type == "QuantizeLinear":
            continue
        quantity = all if _converts(node) else any
        movable = quantity is all or node.op_type in MOVES
        if movable and quantity(_wants(value, fixed, wanted, quantity) for value in float_outputs(node)):
            wanted.add(node)
    stays = set(fixed)
    for node in nodes:
        if node.op_type == "QuantizeLinear" or (node in wanted and not _converts(node)):
            data = [value for _, value in float_inputs(node)][: 1 if node.op_type == "QuantizeLinear" else None]
            if all(_is_float(value, stays) for value in data):
                stays.add(node)
        elif node in wanted:
            stays.add(node)
    return stays


def _is_fixed(node: ir.Node) -> bool:
    """Whether a node can be of no other type: foreign operators, and Casts somebody placed between float types."""
    if node.domain not in ("", "ai.onnx") or node.op_type in SOURCES or node.op_type == "CastLike":
        return True
    if node.op_type == "Cast":
        return not _converts(node)
    return node.op_type == "LayerNormalization" and any(value.uses() for value in node.outputs[1:])


def _converts(node: ir.Node) -> bool:
    """Whether a node makes float32 of integers or truth values."""
    if node.op_type == "DequantizeLinear":
        return bool(float_outputs(node))
    source = node.inputs[0] if node.inputs else None
    integral = source is not None and source.dtype is not None and not source.dtype.is_floating_point()
    return node.op_type == "Cast" and integral and bool(float_outputs(node))


def _wants(
    value: ir.Value, fixed: set[ir.Node], wanted: set[ir.Node], quantity: Callable[[Iterable[object]], bool]
) -> bool:
    """Whether any or all of what reads a value wants it in float32."""
    readers = [user in fixed or user in wanted for user in users(value) if user.op_type != "QuantizeLinear"]
    return quantity([*readers, *([True] if value.is_graph_output() else [])])


def _is_float(value: ir.Value, stays: set[ir.Node]) -> bool:
    if constant_tensor(value) is not None:
        return True
    producer = value.producer()
    return producer is None or producer in stays
