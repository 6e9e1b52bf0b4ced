"""INT8 Q/DQ graphs: what every target takes, and how far a graph is from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mtu_compile.core.errors import PassError

if TYPE_CHECKING:
    import onnx

#: Operations whose weights (or both operands) NNCF quantises in a UNet.
LAYERS = ("Conv", "Gemm", "MatMul")

#: Operations that hand integers on unchanged: a quantiser before one of them serves the layer behind it.
_TRANSPARENT = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)


def sign_activations(model: onnx.ModelProto) -> int:
    """Turn uint8 quantisers of zero point 0 into int8 ones of the same range, in place; returns how many.

    A value in [0, 255·s] in steps of s is then in [0, 127·s'] in steps of s' = s·255/127.

    Raises:
        PassError: a uint8 quantiser has another zero point, or shares its scale with something else.
    """
    import onnx
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    unsigned = {"QuantizeLinear": 0, "DequantizeLinear": 0}
    pairs: dict[tuple[str, str], None] = {}
    changed_types: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in unsigned or len(node.input) < 3 or node.input[2] not in initializers:
            continue
        if initializers[node.input[2]].data_type != onnx.TensorProto.UINT8:
            continue
        if numpy_helper.to_array(initializers[node.input[2]]).any() or node.input[0] in initializers:
            raise PassError(f"{node.name or node.op_type} is an asymmetric quantiser")
        unsigned[node.op_type] += 1
        pairs[node.input[1], node.input[2]] = None
        changed_types.update((node.input[2], *(node.output if node.op_type == "QuantizeLinear" else ())))
    shared = {name for node in model.graph.node for name in node.input if node.op_type not in unsigned}
    for scale_name, zero_name in pairs:
        if {scale_name, zero_name} & shared:
            raise PassError(f"quantiser scale {scale_name!r} is used by other operations too")
    for name in dict.fromkeys(scale for scale, _ in pairs):
        scale = numpy_helper.to_array(initializers[name])
        widened = (scale.astype(np.float64) * 255 / 127).astype(scale.dtype)
        initializers[name].CopyFrom(numpy_helper.from_array(widened, name))
    for name in dict.fromkeys(zero for _, zero in pairs):
        zero = numpy_helper.to_array(initializers[name])
        initializers[name].CopyFrom(numpy_helper.from_array(zero.astype(np.int8), name))
    for value in [v for v in model.graph.value_info if v.name in changed_types]:
        model.graph.value_info.remove(value)
    return unsigned["QuantizeLinear"]


def verify(model: onnx.ModelProto) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Check that a Q/DQ graph is one every target takes.

    Signed int8 only, all zero points 0, biases float (TensorRT refuses INT32 Q/DQ on biases), and at least one
    quantised weight.

    Returns:
        By operation type how many layers run in INT8 and how many there are, and the names of those that do not.

    Raises:
        PassError: naming the node that is not so.
    """
    import onnx
    from onnx import numpy_helper

    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    quantised_weights = 0
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        name = node.name or node.output[0]
        source = initializers.get(node.input[0])
        zero = initializers.get(node.input[2]) if len(node.input) > 2 else None
        if zero is None:
            raise PassError(f"quantiser {name!r} has no constant zero point")
        for tensor in (source, zero):
            if tensor is not None and tensor.data_type != onnx.TensorProto.INT8:
                kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
                raise PassError(f"quantiser {name!r} is {kind}, not int8")
        if numpy_helper.to_array(zero).any():
            raise PassError(f"quantiser {name!r} has a zero point that is not 0")
        quantised_weights += source is not None
    if not quantised_weights:
        raise PassError("no weight was quantised", hint="the ignored scopes cover every layer, or the graph has none")
    counts = dict.fromkeys(LAYERS, (0, 0))
    float_layers = []
    for node in model.graph.node:
        if node.op_type in LAYERS:
            quantised = all(_dequantised(name, producers) for name in node.input[:2])
            done, total = counts[node.op_type]
            counts[node.op_type] = (done + quantised, total + 1)
            if not quantised:
                float_layers.append(node.name)
            for bias in node.input[2:3]:
                if bias in producers and producers[bias].op_type == "DequantizeLinear":
                    raise PassError(f"the bias of {node.name!r} is quantised")
    return {name: count for name, count in counts.items() if count[1]}, tuple(float_layers)


def _dequantised(name: str, producers: Mapping[str, onnx.NodeProto]) -> bool:
    """Whether a tensor holds dequantised integers, perhaps moved about."""
    node = producers.get(name)
    if node is None:
        return False
    if node.op_type in _TRANSPARENT:
        data = node.input if node.op_type == "Concat" else node.input[:1]
        return all(_dequantised(source, producers) for source in data)
    return bool(node.op_type == "DequantizeLinear")


def count_pairs(model: onnx.ModelProto) -> tuple[int, int]:
    """Quantisers of activations, and weights behind a DequantizeLinear."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    activations = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    dequantisers = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    return activations, sum(node.input[0] in initializers for node in dequantisers)
