"""A half-precision graph as a float32 graph that rounds: to run it where half precision is not what it seems.

ONNX Runtime on a CPU has no bfloat16 convolution, and runs most float16 operators in float32, without rounding between
them. The graph made here rounds exactly where the half graph's types say so; inside an operator it computes in float32,
as TensorRT does in norms and softmax and in the sums of layers. It cannot know of sums a GPU keeps in float16, nor of
roundings a GPU leaves out where it fuses operators.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import remove_unused
from passes.keep_float import FLOAT, MOVES

HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

#: First opset whose Cast and QuantizeLinear are those of bfloat16 graphs, too (see ``passes.to_half.BF16_OPSET``).
OPSET = 22


def simulate_half(graph: ir.Model) -> int:
    """Rewrite a strongly typed half graph in place; returns the number of places that round.

    *Given*::

        a = Conv(x f16, w f16) → y = Sigmoid(a) f16

    *Result*::

        a = Conv(x f32, w f32) → r = Cast(Cast(a, f16), f32) → s = Sigmoid(r) → y = Cast(Cast(s, f16), f32)

    Weights keep their rounded numbers. What only moves numbers does not round, and neither do quantisers' scales, which
    are rounded already. A graph of float32 stays as it is.
    """
    for value in graph.graph.initializers.values():
        if value.dtype in HALF and value.const_value is not None:
            _widen(value, value.const_value)
    places = 0
    for node in list(graph.graph):
        for value in [value for value in node.outputs if value.dtype in HALF]:
            dtype = value.dtype
            assert dtype is not None
            if node.op_type == "Cast":
                _insert(graph, node, value, [FLOAT])
            else:
                value.dtype = FLOAT
                if node.op_type in MOVES:
                    continue
                _insert(graph, node, value, [dtype, FLOAT])
            places += 1
    if places:
        graph.opset_imports[""] = max(graph.opset_imports.get("", 0), OPSET)
    remove_unused(graph)
    return places


def write_simulation(half: Path, out: Path) -> Path:
    """The same from file to file."""
    graph = graph_io.load(half)
    simulate_half(graph)
    graph_io.check(graph, "passes.simulate_half")
    return graph_io.save(graph, out)


def _widen(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Store a constant in float32; computed when it is read, so that weights do not pile up in memory."""
    shape = ir.Shape(tensor.shape.numpy())
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32)), dtype=FLOAT, shape=shape, name=value.name
    )
    value.dtype = FLOAT


def _insert(graph: ir.Model, node: ir.Node, value: ir.Value, dtypes: list[ir.DataType]) -> None:
    """Cast a value through ``dtypes`` before anybody reads it."""
    readers = list(value.uses())
    last = value
    nodes = []
    for number, dtype in enumerate(dtypes):
        cast = ir.Value(name=f"{value.name}.rounded_{number}", type=ir.TensorType(dtype), shape=value.shape)
        attributes = [ir.AttrInt64("to", dtype.value)]
        nodes.append(ir.Node("", "Cast", [last], attributes, outputs=[cast], name=f"{value.name}/round_{number}"))
        last = cast
    graph.graph.insert_after(node, nodes)
    for user, place in readers:
        user.replace_input_with(place, last)
