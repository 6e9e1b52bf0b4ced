"""``mtu::legalise-qdq``: quantisers become what TensorRT takes and fuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph import qdq
from mtu_compile.graph.edit import constant_tensor, produced_by, remove_unused, users
from passes.base import TASK_PIPELINE, PassContext, PassResult, Skipped

#: Between the query·key product and the softmax: scale and mask.
_SCORES = ("Add", "Div", "Mul", "Where")

#: Between the softmax and the attention·value product: what guards against rows that are masked everywhere.
_WEIGHTS = ("Where",)


class LegaliseQdq:
    """Let all quantisers be symmetric int8 (or FP8), biases be float, and attention be quantised all or not at all.

    *Given*::

        q = DQ(QL(query)); k = DQ(QL(key)); a = Softmax(MatMul(q, k)); y = MatMul(a, value)
        b = DQ(int32 bias, s); c = Conv(x, w, b); u = DQ(QL(c, s, uint8 0), s, uint8 0)

    *Result*::

        a = Softmax(MatMul(query, key)); y = MatMul(a, value)
        c = Conv(x, w, float bias); u = DQ(QL(c, s·255/127, int8 0), s·255/127, int8 0)

    Fires on

    1. uint8 quantisers of zero point 0, and those without a zero point, which are uint8, too;
    2. constants of INT32 and quantised biases of Conv and Gemm behind a DequantizeLinear, which TensorRT refuses: they
       become float;
    3. attention of which one product is quantised and the other is not, as NNCF leaves it: its quantisers go.
       TensorRT-RTX 1.7 then runs it as one fused kernel instead of three and more (docs/decisions/0007-precision.md).

    Does not fire on

    1. a graph without quantisers;
    2. attention of which all four operands are quantised, or none;
    3. quantisers around a Resize of nearest neighbours: two pairs of one scale look like one too many, but TensorRT
       takes both into the Resize;
    4. quantisers of skip connections, residuals and layers: NNCF puts them at the inputs of layers and before what only
       moves numbers, never between a layer and its bias or activation, and TensorRT fuses those.

    ``skipped`` names attention whose quantisers serve other layers, too. Refuses (``PassError``) quantisers with a zero
    point that is not 0 or not constant.
    """

    id = "mtu::legalise-qdq"
    after: tuple[str, ...] = TASK_PIPELINE

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        for node in qdq.quantisers(graph):
            zero = qdq.zero_point(node)
            name = node.name or node.outputs[0].name
            if zero is not None and (tensor := constant_tensor(zero)) is None:
                raise PassError(f"quantiser {name!r} has no constant zero point")
            if zero is not None and np.any(tensor.numpy().astype(np.float32)):  # type: ignore[union-attr]
                raise PassError(
                    f"quantiser {name!r} has a zero point that is not 0: it is asymmetric",
                    hint="quantise with a symmetric preset",
                )

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        rewrites = _spell_zero_points(graph)
        rewrites += qdq.sign_activations(graph)
        rewrites += _float_biases(graph)
        skipped: list[Skipped] = []
        for attention in _attentions(graph):
            sides = [_quantiser(node, place) for node in (attention.scores, attention.mixes) for place in (0, 1)]
            if None not in sides or not any(sides):
                continue
            for side in sides:
                if side is not None and (reason := side.remove()):
                    skipped.append(Skipped(side.layer.name or "", reason))
                elif side is not None:
                    rewrites += 1
        remove_unused(graph)
        return PassResult(self.id, graph, rewrites, tuple(skipped))

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        for node in qdq.quantisers(graph):
            qdq.check_quantiser(node, (qdq.INT8, qdq.FP8))
        for node in graph.graph:
            if any(_quantised_bias(node)):
                raise PassError(f"the bias of {node.name!r} is quantised")


def _spell_zero_points(graph: ir.Model) -> int:
    """Write down the zero points that are left away: uint8 for QuantizeLinear, its input's type for the other."""
    added = 0
    for node in qdq.quantisers(graph):
        if qdq.zero_point(node) is not None or "output_dtype" in node.attributes:
            continue
        source = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        dtype = (source.dtype if source is not None else None) or ir.DataType.UINT8
        scale = node.inputs[1]
        shape = scale.shape.numpy() if scale is not None and scale.shape is not None else ()
        zero = ir.Value(name=f"{node.name or node.outputs[0].name}.zero_point", shape=ir.Shape(shape))
        zero.const_value = ir.tensor(np.zeros(shape, dtype.numpy()), dtype=dtype, name=zero.name)
        zero.dtype = dtype
        graph.graph.register_initializer(zero)
        node.resize_inputs(3)
        node.replace_input_with(2, zero)
        added += 1
    return added


def _float_biases(graph: ir.Model) -> int:
    """Dequantise biases, and whatever else is INT32."""
    changed = 0
    for node in list(graph.graph):
        source = constant_tensor(node.inputs[0]) if node.op_type == "DequantizeLinear" else None
        scale = constant_tensor(node.inputs[1]) if source is not None else None
        if source is None or scale is None:
            continue
        of_layers = [any(node is bias for bias in _quantised_bias(user)) for user in users(node.outputs[0])]
        if source.dtype != ir.DataType.INT32 and not any(of_layers):
            continue
        numbers, rank = scale.numpy().astype(np.float64), source.shape.rank()
        if numbers.size > 1 and rank > 1:
            axis = node.attributes.get_int("axis", 1) % rank
            numbers = numbers.reshape([-1 if d == axis else 1 for d in range(rank)])
        bias = ir.tensor((source.numpy().astype(np.float64) * numbers).astype(scale.numpy().dtype))
        value = ir.Value(name=f"{node.outputs[0].name}.float", shape=ir.Shape(source.shape.numpy()), const_value=bias)
        bias.name, value.dtype = value.name, bias.dtype
        graph.graph.register_initializer(value)
        if source.dtype == ir.DataType.INT32:
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
        else:
            for user, place in list(node.outputs[0].uses()):
                if place == 2 and any(node is bias for bias in _quantised_bias(user)):
                    user.replace_input_with(place, value)
        changed += 1
    return changed


def _quantised_bias(node: ir.Node) -> Iterator[ir.Node]:
    if node.op_type in qdq.LAYERS and len(node.inputs) > 2:
        found = produced_by(node.inputs[2], "DequantizeLinear")
        if found is not None:
            yield found


@dataclass(frozen=True)
class _Attention:
    """softmax(query·key)·value: the two products."""

    scores: ir.Node
    mixes: ir.Node


@dataclass(frozen=True)
class _Quantiser:
    """The Q/DQ pair one operand of a product comes through.

    Attributes:
        layer: the product.
        value: what the DequantizeLinear makes.
        original: what the QuantizeLinear reads.
        shared: whether something else than the product reads it, too.
    """

    layer: ir.Node
    value: ir.Value
    original: ir.Value
    shared: bool

    def remove(self) -> str:
        """Take the pair out; why not, if it has to stay."""
        if not self.shared:
            ir.convenience.replace_all_uses_with(self.value, self.original)
            return ""
        places = [place for place, value in enumerate(self.layer.inputs) if value is self.value]
        for place in places:
            self.layer.replace_input_with(place, self.original)
        return "" if places else f"its quantiser {self.value.name!r} serves other layers, too"


def _attentions(graph: ir.Model) -> Iterator[_Attention]:
    for node in graph.graph:
        if node.op_type != "Softmax":
            continue
        scores = _back(node.inputs[0])
        mixes = _forward(node.outputs[0])
        if scores is not None and mixes is not None:
            yield _Attention(scores, mixes)


def _back(value: ir.Value | None) -> ir.Node | None:
    """The product that the scores come from."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type == "MatMul":
        return node
    if node.op_type not in (*_SCORES, *qdq.TRANSPARENT):
        return None
    found = (_back(source) for source in node.inputs)
    return next((product for product in found if product is not None), None)


def _forward(value: ir.Value) -> ir.Node | None:
    """The product that the attention weights go to."""
    for node in users(value):
        if node.op_type == "MatMul":
            return node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", *_WEIGHTS, *qdq.TRANSPARENT):
            found = _forward(node.outputs[0])
            if found is not None:
                return found
    return None


def _quantiser(layer: ir.Node, place: int) -> _Quantiser | None:
    """What quantises an operand, if it is an activation."""
    value, shared = layer.inputs[place], False
    while value is not None and (node := value.producer()) is not None:
        shared = shared or len(value.uses()) > 1 or value.is_graph_output()
        if node.op_type == "DequantizeLinear":
            source = produced_by(node.inputs[0], "QuantizeLinear")
            original = source.inputs[0] if source is not None else None
            return _Quantiser(layer, value, original, shared) if original is not None else None
        if node.op_type not in qdq.TRANSPARENT or node.op_type == "Concat":
            return None
        value = node.inputs[0]
    return None
