"""Memory estimate of a static ONNX graph, from its shapes alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from mtu_compile.core.errors import ModelError
from targets.base import Plan, Precision

if TYPE_CHECKING:
    import onnx

#: Bytes of a float element once the graph runs in that precision. An INT8 graph keeps what is not quantised in the
#: 16-bit type; its quantised weights are integers in the graph already.
FLOAT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 2}


def estimate(graph: Path, *, precision: Precision, device_bytes: int | None) -> Plan:
    """Weights and peak activations of ``graph`` at ``precision``.

    Activations are counted in the graph's own node order: a tensor lives from the node that makes it to the last node
    that reads it. Weights stay on disk: external data is not read.

    Raises:
        ModelError: ``graph`` is not a whole ONNX file, or its weights lie outside its folder.
    """
    import onnx

    from mtu_compile import graph_io

    model = graph_io.load_proto(graph)
    try:
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:  # onnx raises unrelated types for graphs it cannot follow
        raise ModelError(f"the shapes in {graph} cannot be inferred: {error}") from error
    width = FLOAT_BYTES[precision]
    constants = _constants(model.graph)
    weights = sum(math.prod(tensor.dims) * _element_bytes(tensor.data_type, width) for tensor in constants)
    activations, unknown = _peak(model.graph, width)
    return Plan(weights, activations, device_bytes, unknown)


def _constants(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    values = [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"]
    return [*graph.initializer, *values]


def _element_bytes(element: int, float_bytes: int) -> int:
    import onnx

    if element in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
        return float_bytes
    return int(onnx.helper.tensor_dtype_to_np_dtype(element).itemsize)


def _peak(graph: onnx.GraphProto, float_bytes: int) -> tuple[int, int]:
    """Largest number of bytes alive at once, and the number of tensors of unknown shape."""
    sizes: dict[str, int] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
        if tensor.HasField("shape") and min(dims, default=1) >= 0:
            sizes[value.name] = math.prod(dims) * _element_bytes(tensor.elem_type, float_bytes)
    constants = {tensor.name for tensor in graph.initializer}
    last_use = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last_use.update((value.name, len(graph.node)) for value in graph.output)
    alive = {value.name: sizes.get(value.name, 0) for value in graph.input if value.name not in constants}
    peak, unknown = sum(alive.values()), 0
    for index, node in enumerate(graph.node):
        if node.op_type == "Constant":
            continue
        for name in filter(None, node.output):
            unknown += name not in sizes
            alive[name] = sizes.get(name, 0)
        peak = max(peak, sum(alive.values()))
        for name in (*node.input, *node.output):
            if last_use.get(name, -1) <= index:
                alive.pop(name, None)
    return peak, unknown
