"""What a quantised graph has to be like so that every target takes it.

Graphs carry QuantizeLinear and DequantizeLinear nodes ("Q/DQ"). Calibration makes them, passes legalise them, and both
ask here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import add_lazy_constant, attribute

#: Operations whose weights (or both operands) are quantised in a UNet.
LAYERS = ("Conv", "Gemm", "MatMul")

#: Operations that hand integers on unchanged: a quantiser before one of them serves the layer behind it.
TRANSPARENT = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)

INT8 = ir.DataType.INT8
FP8 = ir.DataType.FLOAT8E4M3FN


def quantisers(model: ir.Model) -> Iterator[ir.Node]:
    """All QuantizeLinear and DequantizeLinear nodes, in graph order."""
    return (node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear"))


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initialiser."""
    return None if value is None or value.is_graph_input() else value.const_value


def zero_point(node: ir.Node) -> ir.Value | None:
    """The third input of a quantiser."""
    return node.inputs[2] if len(node.inputs) > 2 else None


def sign_activations(model: ir.Model) -> int:
    """Turn uint8 quantisers of zero point 0 into int8 ones of the same range, in place; returns how many.

    A value in [0, 255·s] in steps of s is then in [0, 127·s'] in steps of s' = s·255/127.

    Raises:
        PassError: a uint8 quantiser has another zero point, or shares its scale with something else.
    """
    unsigned = []
    for node in quantisers(model):
        zero = constant(zero_point(node))
        if zero is None or zero.dtype != ir.DataType.UINT8:
            continue
        if np.any(zero.numpy()) or constant(node.inputs[0]) is not None:
            raise PassError(f"{node.name or node.op_type} is an asymmetric quantiser")
        unsigned.append(node)
    for place in (1, 2):
        for value in dict.fromkeys(node.inputs[place] for node in unsigned):
            assert value is not None
            if any(user not in unsigned for user in value.consumers()):
                raise PassError(f"quantiser scale {value.name!r} is used by other operations too")
            tensor = constant(value)
            if tensor is None:
                raise PassError(f"quantiser scale {value.name!r} is not constant")
            array = tensor.numpy()
            changed = (array.astype(np.float64) * 255 / 127).astype(array.dtype) if place == 1 else array.astype("i1")
            value.const_value = ir.tensor(changed, name=value.name)
            value.dtype = value.const_value.dtype
    for node in unsigned:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = INT8
    return sum(node.op_type == "QuantizeLinear" for node in unsigned)


def verify(
    model: ir.Model, *, types: Collection[ir.DataType] = (INT8,)
) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """Check that a Q/DQ graph is one every target takes.

    Quantised types of ``types`` only, all zero points 0, biases float (TensorRT refuses INT32 Q/DQ on biases), and at
    least one quantised weight.

    Returns:
        By operation type how many layers run quantised and how many there are, and the names of those that do not.

    Raises:
        PassError: naming the node that is not so.
    """
    quantised_weights = 0
    for node in quantisers(model):
        check_quantiser(node, types)
        quantised_weights += constant(node.inputs[0]) is not None
    if not quantised_weights:
        raise PassError("no weight was quantised", hint="the ignored scopes cover every layer, or the graph has none")
    counts = dict.fromkeys(LAYERS, (0, 0))
    float_layers = []
    for node in model.graph:
        if node.op_type in LAYERS:
            quantised = all(is_dequantised(value) for value in node.inputs[:2])
            done, total = counts[node.op_type]
            counts[node.op_type] = (done + quantised, total + 1)
            if not quantised:
                float_layers.append(node.name or "")
            for bias in node.inputs[2:3]:
                producer = bias.producer() if bias is not None else None
                if producer is not None and producer.op_type == "DequantizeLinear":
                    raise PassError(f"the bias of {node.name!r} is quantised")
    return {name: count for name, count in counts.items() if count[1]}, tuple(float_layers)


def check_quantiser(node: ir.Node, types: Collection[ir.DataType]) -> None:
    """Raise ``PassError`` with the name of a quantiser that is of another type or has a zero point."""
    name = node.name or node.outputs[0].name
    zero = constant(zero_point(node))
    if zero is None:
        raise PassError(f"quantiser {name!r} has no constant zero point")
    for tensor in (constant(node.inputs[0]), zero):
        if tensor is not None and tensor.dtype not in types:
            wanted = " or ".join(one.name.lower() for one in types)
            raise PassError(f"quantiser {name!r} is {tensor.dtype.name.lower()}, not {wanted}")
    if np.any(_float(zero)):
        raise PassError(f"quantiser {name!r} has a zero point that is not 0")


def is_dequantised(value: ir.Value | None) -> bool:
    """Whether a tensor holds dequantised numbers, perhaps moved about."""
    node = value.producer() if value is not None else None
    if node is None:
        return False
    if node.op_type in TRANSPARENT:
        data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        return all(is_dequantised(source) for source in data)
    return node.op_type == "DequantizeLinear"


def drop_idle(model: ir.Model) -> int:
    """Take out the quantisers of activations that no quantised layer reads, in place; returns how many.

    NNCF leaves one before a Resize whose convolution is to stay float: it costs accuracy, and time, for nothing.
    """
    dropped = 0
    for node in list(model.graph):
        source = (
            node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
        )
        if source is None or source.op_type != "QuantizeLinear" or node.outputs[0].is_graph_output():
            continue
        original = source.inputs[0]
        if original is not None and constant(original) is None and not _serves(node.outputs[0]):
            ir.convenience.replace_all_uses_with(node.outputs[0], original)
            dropped += 1
    if dropped:
        RemoveUnusedNodesPass()(model)
    return dropped


def _serves(value: ir.Value) -> bool:
    """Whether a quantised layer reads ``value``, perhaps moved about."""
    for user in value.consumers():
        if user.op_type in LAYERS and all(is_dequantised(source) for source in user.inputs[:2]):
            return True
        if user.op_type in TRANSPARENT and any(_serves(output) for output in user.outputs):
            return True
    return False


def activation_quantisers(value: ir.Value | None) -> list[ir.Node]:
    """The QuantizeLinear nodes a dequantised activation comes from, perhaps moved about; none for a weight."""
    node = value.producer() if value is not None else None
    if node is None:
        return []
    if node.op_type == "QuantizeLinear":
        return [] if constant(node.inputs[0]) is not None else [node]
    if node.op_type == "DequantizeLinear" or node.op_type in TRANSPARENT:
        data = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        return [found for source in data for found in activation_quantisers(source)]
    return []


def fold_weights(model: ir.Model) -> int:
    """Let a graph have its quantised weights as the floats they stand for, in place; returns how many.

    *Given*::

        y = Conv(x, DequantizeLinear(w int8, scale, zero))

    *Result*::

        y = Conv(x, w')                  w' in the type of the scale; computed when it is read

    For graphs that are run and not built: a run without optimisations would compute them each time. Weights in blocks
    (INT4) stay as they are.
    """
    folded = 0
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        stored, scale, zero = (constant(value) for value in (*node.inputs[:2], zero_point(node)))
        value, axis = node.outputs[0], attribute(node, "axis", 1)
        if stored is None or scale is None or attribute(node, "block_size", 0) or value.is_graph_output():
            continue
        shape = tuple(int(size) for size in stored.shape.numpy())
        folds = partial(_dequantised, stored, scale, zero, axis)
        weight = add_lazy_constant(model, f"{value.name}.folded", shape, scale.dtype, folds)
        ir.convenience.replace_all_uses_with(value, weight)
        folded += 1
    if folded:
        RemoveUnusedNodesPass()(model)
    return folded


def _dequantised(
    stored: ir.TensorProtocol, scale: ir.TensorProtocol, zero: ir.TensorProtocol | None, axis: int
) -> NDArray[Any]:
    """What a DequantizeLinear makes: computed in float32, in the type of the scale."""
    numbers = _float(stored)
    shape = [1] * numbers.ndim
    if scale.size > 1:
        shape[axis] = -1
    if zero is not None:
        numbers -= _float(zero).reshape(shape)
    numbers *= _float(scale).reshape(shape)
    return numbers.astype(scale.numpy().dtype, copy=False)


def count_pairs(model: ir.Model) -> tuple[int, int]:
    """Quantisers of activations, and weights behind a DequantizeLinear."""
    nodes = list(quantisers(model))
    activations = sum(node.op_type == "QuantizeLinear" for node in nodes)
    weights = sum(node.op_type == "DequantizeLinear" and constant(node.inputs[0]) is not None for node in nodes)
    return activations, weights


def _float(tensor: ir.TensorProtocol) -> NDArray[Any]:
    return tensor.numpy().astype(np.float32)
