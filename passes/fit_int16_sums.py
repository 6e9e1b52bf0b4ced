"""``mtu::fit-int16-sums``: INT8 weights whose products add up in 16 bits without overflowing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq
from mtu_compile.graph.edit import Array, constant_tensor
from passes.base import PassContext, PassResult, Skipped

#: Two weights of one sign that are added up may be this large together: 255 · 128 = 32,640 is the most that fits into
#: 16 bits when the activation is an unsigned byte.
LIMIT = 128

#: Largest integer of a symmetric weight.
_MOST = 127

#: Weights that are rounded at once.
_BLOCK = 1 << 18


class FitInt16Sums:
    """Give a weight's output channels a coarser scale where two neighbouring products could overflow 16 bits.

    x86 CPUs without VNNI multiply four unsigned activations with four signed weights by ``vpmaddubsw``, which adds the
    products of each two neighbouring input channels in 16 bits, and cuts off what does not fit: on the emoji example
    that costs 5 dB. Seven bits for all weights would cure it; this takes only what a channel needs, about half a bit
    (docs/decisions/0011-int8-on-every-cpu.md).

    *Given*, for the input channels 2i and 2i + 1 of one output channel::

        w8 = 120, 90 (s)       → 255 · (120 + 90) = 53,550 > 32,767

    *Result*, the whole output channel rounded anew to steps of s·210/128::

        w8 = 73, 55 (1.64 s)   → 255 · (73 + 55) = 32,640

    Fires on constant int8 weights of Conv, Gemm and MatMul whose activation is quantised, too.

    Does not fire on

    1. output channels that cannot overflow as they are;
    2. layers whose activation is float: nothing is added up in 16 bits.

    Weights are rounded from the float graph (``PassContext.original``) where it has the weight that was quantised, and
    from the integers where it has not (smoothed weights): that rounds twice. ``skipped`` names weights that several
    layers read in different ways, and leaves them. Refuses (``PassError``) a weight with a zero point.
    """

    id = "mtu::fit-int16-sums"
    after: tuple[str, ...] = ("mtu::legalise-qdq", "mtu::uint8-activations")

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        for weight in _weights(graph):
            zero = qdq.constant(qdq.zero_point(weight.dequantise))
            if zero is not None and np.any(zero.numpy()):
                raise PassError(f"weight {weight.name!r} has a zero point that is not 0")

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        originals = {} if context.original is None else _layer_weights(graph_io.load(context.original))
        rewrites, skipped = 0, list[Skipped]()
        for weight in _weights(graph):
            if reason := weight.why_not():
                skipped.append(Skipped(weight.name, reason))
            elif _fit(graph, weight, originals.get(weight.layer.name)):
                rewrites += 1
        return PassResult(self.id, graph, rewrites, tuple(skipped))

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        for weight in _weights(graph):
            if not weight.why_not() and (largest_pairs(weight.integers(), weight.axis) > LIMIT).any():
                raise PassError(f"products with {weight.name!r} may overflow 16 bits")


@dataclass(frozen=True, eq=False)
class _Weight:
    """An int8 weight of a layer with a quantised activation.

    Attributes:
        layer: the Conv, Gemm or MatMul.
        dequantise: the DequantizeLinear it comes through.
        axis: of the weight, its output channels.
    """

    layer: ir.Node
    dequantise: ir.Node
    axis: int

    @property
    def name(self) -> str:
        return str(self.layer.name or self.dequantise.outputs[0].name)

    def integers(self) -> Array:
        """[…] int8."""
        tensor = constant_tensor(self.dequantise.inputs[0])
        assert tensor is not None
        return tensor.numpy()

    def scales(self) -> Array:
        """One for each output channel, float64."""
        scale, count = constant_tensor(self.dequantise.inputs[1]), self.integers_shape[self.axis]
        assert scale is not None
        return np.broadcast_to(scale.numpy().astype(np.float64).reshape(-1), (count,)).copy()

    @property
    def integers_shape(self) -> tuple[int, ...]:
        tensor = constant_tensor(self.dequantise.inputs[0])
        assert tensor is not None
        return tuple(tensor.shape.numpy())

    def why_not(self) -> str:
        """Why the weight cannot be rounded anew; empty if it can."""
        scale = constant_tensor(self.dequantise.inputs[1])
        if scale is None:
            return "its scale is not constant"
        rank = len(self.integers_shape)
        if scale.shape.numpy() not in ((), (1,)) and self.dequantise.attributes.get_int("axis", 1) % rank != self.axis:
            return "its scales are not those of output channels"
        if any(_output_axis(user, rank) != self.axis for user in self.dequantise.outputs[0].consumers()):
            return "several layers read it in different ways"
        return ""


def largest_pairs(integers: Array, axis: int) -> Array:
    """By output channel, the largest sum of two weights of one sign that 16-bit arithmetic adds up: input channels 2i
    and 2i + 1 at the same place of a kernel.

    Args:
        integers: a weight; its input channels are the first axis that is not ``axis``.
        axis: output channels.
    """
    weight = np.moveaxis(integers, axis, 0)
    rest = tuple(range(1, weight.ndim))
    largest: Array = np.maximum(weight.max(axis=rest), -weight.min(axis=rest).astype(np.int32))
    if (inputs := weight.shape[1]) > 1:
        # Of two of one sign the sum; where signs differ, it is less than the larger of them.
        sums = np.add(weight[:, 0 : inputs - 1 : 2], weight[:, 1::2], dtype=np.int16)
        largest = np.maximum(largest, np.maximum(sums.max(axis=rest), -sums.min(axis=rest)))
    return largest.astype(np.int32)


def _fit(graph: ir.Model, weight: _Weight, original: ir.TensorProtocol | None) -> bool:
    """Round a weight anew where it has to be; returns whether it had to."""
    stored, scales, axis = weight.integers(), weight.scales(), weight.axis
    if not (largest_pairs(stored, axis) > LIMIT).any():
        return False
    integers, floats = np.moveaxis(stored.copy(), axis, 0), None
    if original is not None and tuple(original.shape.numpy()) == stored.shape:
        floats = np.moveaxis(graph_io.read_weight(original), axis, 0)
    parts = [slice(at, at + _together(integers)) for at in range(0, len(integers), _together(integers))]
    # Half a step is what rounding leaves; more, and it was another weight that was quantised.
    if floats is not None and not all(_rounds_to(floats[part], integers[part], scales[part]) for part in parts):
        floats = None
    for part in parts:
        exact = integers[part] if floats is None else floats[part]
        integers[part], scales[part] = _rounded(integers[part], scales[part], exact, in_steps=floats is None)
    integers = np.moveaxis(integers, 0, axis)
    numbers, steps, zero = weight.dequantise.inputs
    assert numbers is not None and steps is not None and numbers.const_value is not None
    kind = steps.const_value.numpy().dtype if steps.const_value is not None else np.dtype(np.float32)
    _give(graph, weight.dequantise, 0, np.ascontiguousarray(integers), "fitted")
    _give(graph, weight.dequantise, 1, scales.astype(kind), "fitted")
    if zero is not None:
        _give(graph, weight.dequantise, 2, np.zeros(len(scales), np.int8), "fitted")
    weight.dequantise.attributes["axis"] = ir.AttrInt64("axis", axis)
    return True


def _together(integers: Array) -> int:
    """How many output channels are worked on at once: few enough for a CPU's cache."""
    return max(1, _BLOCK * len(integers) // integers.size)


def _rounds_to(floats: Array, integers: Array, scales: Array) -> bool:
    """Whether ``integers`` are ``floats`` in steps of ``scales``, one an output channel, the first axis."""
    steps = scales.astype(np.float32).reshape(-1, *[1] * (integers.ndim - 1))
    return bool((np.abs(floats - integers * steps) <= 0.505 * steps).all())


def _rounded(integers: Array, scales: Array, exact: Array, *, in_steps: bool) -> tuple[Array, Array]:
    """``integers`` [output channels, …] within the limit, and their scales.

    Args:
        exact: what is rounded, ``in_steps`` of ``scales`` or as it is.
    """
    integers, scales = np.array(integers), scales.copy()
    over = largest_pairs(integers, 0)
    left = np.flatnonzero(over > LIMIT)
    ones = [1] * (integers.ndim - 1)
    exact = exact[left].astype(np.float32)
    if in_steps:
        exact *= scales[left].astype(np.float32).reshape(-1, *ones)
    while len(left):
        # A channel that rounding brought back above the limit by one gets a little more.
        scales[left] *= np.maximum(over[left] / LIMIT, 1.002)
        steps = scales[left].astype(np.float32).reshape(-1, *ones)
        integers[left] = np.clip(np.rint(exact / steps), -_MOST, _MOST)
        over[left] = largest_pairs(integers[left], 0)
        still = over[left] > LIMIT
        left, exact = left[still], exact[still]
    return integers, scales


def _give(graph: ir.Model, node: ir.Node, place: int, array: Array, suffix: str) -> None:
    """Let ``node`` read a new constant, called after the one it read."""
    old = node.inputs[place]
    name = f"{old.name}.{node.name or node.outputs[0].name}.{suffix}" if old is not None else suffix
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.graph.register_initializer(value)
    node.replace_input_with(place, value)
    if old is not None and old.is_initializer() and not old.uses() and old.name is not None:
        del graph.graph.initializers[old.name]


def _weights(graph: ir.Model) -> Iterator[_Weight]:
    """Every int8 weight that is multiplied with a quantised activation, once."""
    seen: set[ir.Node] = set()
    for node in graph.graph:
        if node.op_type not in qdq.LAYERS or not qdq.is_dequantised(node.inputs[0]):
            continue
        source = node.inputs[1].producer() if node.inputs[1] is not None else None
        if source is None or source.op_type != "DequantizeLinear" or source in seen:
            continue
        tensor = constant_tensor(source.inputs[0])
        if tensor is None or tensor.dtype != ir.DataType.INT8 or tensor.shape.rank() < 2:
            continue
        seen.add(source)
        yield _Weight(node, source, _output_axis(node, tensor.shape.rank()))


def _output_axis(layer: ir.Node, rank: int) -> int:
    """Where a layer's weight has its output channels."""
    transposed = layer.op_type == "Gemm" and layer.attributes.get_int("transB", None) == 1
    return 0 if layer.op_type == "Conv" or transposed else rank - 1


def _layer_weights(graph: ir.Model) -> Mapping[str | None, ir.TensorProtocol]:
    """By name of its layer, each constant weight of a float graph."""
    found = ((node.name, constant_tensor(node.inputs[1])) for node in graph.graph if node.op_type in qdq.LAYERS)
    return {name: tensor for name, tensor in found if tensor is not None}
