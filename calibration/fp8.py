"""FP8 (E4M3) from INT8: the same quantisers, in the 8-bit floats of NVIDIA's Ada and Blackwell GPUs.

A calibrated INT8 graph knows the range of every activation. E4M3 reaches 448 instead of 127, so a scale becomes
127/448 of itself and the range stays. Weights are rounded once, from the float graph, with one scale a tensor: of
per-channel scales TensorRT 10.6 says that they are for Hopper. TensorRT-RTX multiplies matrices in FP8 and does not
convolve in it ("Working with Quantized Types", TensorRT-RTX 1.x), so convolutions become float again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq

if TYPE_CHECKING:
    import onnx_ir as ir

#: Largest number of E4M3 ("FN": without infinities; OCP 8-bit floating point specification 1.0).
FP8_MAX = 448.0

#: Largest integer of a symmetric int8 quantiser.
INT8_MAX = 127.0

#: Smallest scale: float16's smallest number with all its bits.
LEAST_SCALE = 2.0**-14

#: What TensorRT-RTX runs in FP8.
GEMMS = ("Gemm", "MatMul")

#: Where the float weight and the dequantised one differ by more than this many steps, they are not the same weight.
#: Rounding is half a step; NNCF clips nothing of weights.
_STEPS = 1.0


@dataclass(frozen=True)
class Fp8Report:
    """What became of a graph.

    Attributes:
        activations: QuantizeLinear/DequantizeLinear pairs on activations, in FP8.
        weights: weights stored as FP8 behind a DequantizeLinear.
        layers: by operation type, how many run in FP8 and how many there are.
        dropped: quantised INT8 layers that are float again.
        bytes_before: the INT8 graph and its weights on disk.
        bytes_after: the FP8 graph's.
    """

    activations: int
    weights: int
    layers: Mapping[str, tuple[int, int]]
    dropped: int
    bytes_before: int
    bytes_after: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "layers": {name: list(counts) for name, counts in self.layers.items()}}


def to_fp8(int8_graph: Path, float_graph: Path, out: Path, *, layers: Sequence[str] = GEMMS) -> Fp8Report:
    """Write the FP8 form of a calibrated INT8 graph to ``out``.

    Args:
        int8_graph: what ``calibration.quantize.quantize_onnx`` wrote: symmetric, float32 scales.
        float_graph: what it was made from: its layers have the same names.
        out: ONNX file to write; above 256 MiB its weights go to ``out`` + ``.data`` beside it.
        layers: operators to run in FP8; the others' quantisers go and their weights are float again.

    Raises:
        ModelError: one of the graphs is unreadable.
        PassError: the graphs do not belong together, the INT8 one is not symmetric, or no layer is left.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model, original = graph_io.load(int8_graph), graph_io.load(float_graph)
    counts, _ = qdq.verify(model)
    floats = {node.name: node for node in original.graph if node.op_type in qdq.LAYERS}
    kept = {node for node in model.graph if node.op_type in layers and _is_quantised(node)}
    for node in [node for node in model.graph if node.op_type in qdq.LAYERS]:
        twin = floats.get(node.name)
        if twin is None or twin.op_type != node.op_type:
            raise PassError(f"{float_graph.name} has no {node.op_type} called {node.name!r}", hint="quantise it again")
        for place, value in enumerate(node.inputs[:2]):
            dequantiser = value.producer() if value is not None else None
            if dequantiser is not None and _holds_weight(dequantiser):
                weight = _same_weight(dequantiser, twin.inputs[place])
                _replace_weight(model, node, place, dequantiser, weight, as_fp8=node in kept)
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        _release(node, kept)
    RemoveUnusedNodesPass()(model)
    _rebase(model)
    graph_io.check(model, "calibration.fp8")
    left, _ = qdq.verify(model, types=(qdq.FP8,))
    graph_io.save(model, out)
    dropped = sum(done for done, _ in counts.values()) - sum(done for done, _ in left.values())
    activations, weights = qdq.count_pairs(model)
    return Fp8Report(activations, weights, left, dropped, graph_io.disk_bytes(int8_graph), graph_io.disk_bytes(out))


def _is_quantised(node: ir.Node) -> bool:
    return all(qdq.is_dequantised(value) for value in node.inputs[:2])


def _holds_weight(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear" and qdq.constant(node.inputs[0]) is not None


def _same_weight(dequantiser: ir.Node, original: ir.Value | None) -> ir.TensorProtocol:
    """The float weight that a dequantiser's integers were rounded from."""
    found = qdq.constant(original)
    integers, scale = qdq.constant(dequantiser.inputs[0]), qdq.constant(dequantiser.inputs[1])
    assert integers is not None and scale is not None
    name = dequantiser.name or dequantiser.outputs[0].name
    if found is None or found.shape != integers.shape:
        raise PassError(f"the float graph has another weight where {name!r} is", hint="quantise it again")
    steps = scale.numpy().astype(np.float64)
    if steps.ndim:
        axis = dequantiser.attributes.get_int("axis", 1)
        steps = steps.reshape([-1 if d == axis % found.shape.rank() else 1 for d in range(found.shape.rank())])
    off = np.abs(integers.numpy() - graph_io.read_weight(found) / steps).max(initial=0.0)
    if off > _STEPS:
        raise PassError(
            f"the weight of {name!r} is {off:.1f} steps off the float graph's",
            hint="smooth-quant changes weights: quantise without it, from this float graph",
        )
    return found


def _replace_weight(
    model: ir.Model, node: ir.Node, place: int, dequantiser: ir.Node, weight: ir.TensorProtocol, *, as_fp8: bool
) -> None:
    """Let ``node`` read ``weight`` itself, or behind a DequantizeLinear from FP8."""
    import onnx_ir as ir

    stem = (dequantiser.outputs[0].name or "weight").removeprefix("dq_output_")

    def register(name: str, tensor: ir.TensorProtocol, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        known = model.graph.initializers.get(name)
        if known is not None:
            return known  # a weight that several layers share
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
        model.graph.register_initializer(value)
        return value

    shape = weight.shape.numpy()
    if not as_fp8:
        node.replace_input_with(place, register(f"{stem}.float", weight, weight.dtype, shape))
        return
    scale = _scale(np.abs(graph_io.read_weight(weight)).max(initial=0.0) / FP8_MAX)
    # Computed when it is written: a graph's weights never lie in memory twice.
    rounded = ir.LazyTensor(
        lambda: ir.Tensor(_to_e4m3(graph_io.read_weight(weight) / scale), dtype=qdq.FP8),
        dtype=qdq.FP8,
        shape=ir.Shape(shape),
    )
    inputs = [
        register(f"{stem}.fp8", rounded, qdq.FP8, shape),
        register(f"{stem}.fp8_scale", ir.tensor(scale), ir.DataType.FLOAT, ()),
        register(f"{stem}.fp8_zero", _fp8_zero(()), qdq.FP8, ()),
    ]
    output = ir.Value(name=f"{stem}.dequantised", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    name = f"{node.name}/DequantizeLinear_{place}"
    model.graph.insert_before(node, ir.Node("", "DequantizeLinear", inputs, outputs=[output], name=name))
    node.replace_input_with(place, output)


def _release(dequantiser: ir.Node, kept: set[ir.Node]) -> None:
    """Let those who read an activation, and are no layer in FP8 nor lead to one, read it unquantised."""
    quantiser = dequantiser.inputs[0].producer() if dequantiser.inputs[0] is not None else None
    original = quantiser.inputs[0] if quantiser is not None and quantiser.op_type == "QuantizeLinear" else None
    if original is None:
        return
    for user, place in list(dequantiser.outputs[0].uses()):
        if not _leads_to(user, kept):
            user.replace_input_with(place, original)


def _leads_to(node: ir.Node, kept: set[ir.Node]) -> bool:
    if node in kept:
        return True
    if node.op_type not in (*qdq.TRANSPARENT, "QuantizeLinear", "DequantizeLinear"):
        return False
    return any(_leads_to(user, kept) for user in node.outputs[0].consumers())


def _rebase(model: ir.Model) -> None:
    """Turn the quantisers of activations from int8 to E4M3 of the same range."""
    import onnx_ir as ir

    done: set[ir.Value] = set()
    for node in qdq.quantisers(model):
        if _holds_weight(node):
            continue
        scale, zero = node.inputs[1], qdq.zero_point(node)
        assert scale is not None and zero is not None
        if scale not in done:
            tensor = qdq.constant(scale)
            if tensor is None:
                raise PassError(f"quantiser {node.name!r} has no constant scale")
            scale.const_value = ir.tensor(_scale(tensor.numpy() * (INT8_MAX / FP8_MAX)), name=scale.name)
        if zero not in done:
            zero.const_value = _fp8_zero(zero.shape.numpy() if zero.shape is not None else (), zero.name)
            zero.dtype = qdq.FP8
        done |= {scale, zero}
        if node.op_type == "QuantizeLinear":
            for value in (node.outputs[0], *_moved(node.outputs[0])):
                value.dtype = qdq.FP8


def _moved(value: ir.Value) -> list[ir.Value]:
    """Integers behind a quantiser that were only moved about."""
    found = []
    for user in value.consumers():
        if user.op_type in qdq.TRANSPARENT:
            found += [user.outputs[0], *_moved(user.outputs[0])]
    return found


def _scale(least: NDArray[Any]) -> NDArray[np.float32]:
    """The next scale that bfloat16 and float16 hold, too: in an 8-bit float a larger one costs no precision."""
    bits = np.asarray(least, np.float32).view(np.uint32)
    up: NDArray[np.float32] = ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.maximum(up, np.float32(LEAST_SCALE))


def _fp8_zero(shape: Sequence[int], name: str | None = None) -> ir.TensorProtocol:
    import onnx_ir as ir

    return ir.Tensor(_to_e4m3(np.zeros(shape)), dtype=qdq.FP8, name=name)


def _to_e4m3(array: NDArray[Any]) -> NDArray[Any]:
    """Round to nearest even; what is above the range, by a rounding error, is cut to it instead of becoming NaN."""
    clipped: NDArray[Any] = np.clip(array, -FP8_MAX, FP8_MAX).astype(np.float32).astype(qdq.FP8.numpy())
    return clipped
