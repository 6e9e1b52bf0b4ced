"""Memory estimate of a static ONNX graph, from its shapes alone: no weight is read.

It was compared with what OpenVINO 2026.4.1 really takes on a CPU; see ``docs/decisions/0008-planner.md``.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mtu_compile.core.precision import QUANTISED, WEIGHTS_ONLY
from targets.base import Precision

if TYPE_CHECKING:
    import onnx_ir as ir

#: Bytes of a float element once a graph runs in that precision.
FLOAT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}

#: Weights that share a scale where linear layers are INT4, and the fewest that do (see ``calibration.compress``).
_INT4_GROUP, _INT4_LEAST_GROUP = 64, 32

#: Layers whose weights are quantised (what NNCF does to a UNet, see ``calibration.quantize``).
_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})

#: Operations that read another operation's buffer, whatever the vendor.
_VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten", "DequantizeLinear"})

#: Operations that only move elements: what is quantised before one of them may be quantised once behind it.
_MOVES = _VIEWS | {"Transpose"}

#: Operations that may write over an input nobody reads any more. Compilers fuse most of them into their neighbours,
#: which takes as little.
_IN_PLACE = frozenset(
    {"Add", "Cast", "Div", "Erf", "Exp", "Gelu", "GroupNormalization", "InstanceNormalization", "LayerNormalization"}
    | {"Mul", "Neg", "Pow", "QuantizeLinear", "Relu", "Sigmoid", "Softmax", "Sqrt", "Sub", "Swish", "Tanh", "Where"}
)

#: What may stand between the product query·key and its softmax, and between that and the product with value.
_BESIDE_SOFTMAX = frozenset({"Add", "Cast", "DequantizeLinear", "Div", "Mul", "QuantizeLinear", "Reshape"})


@dataclass(frozen=True)
class Footprint:
    """What one engine of a graph takes on a device.

    Attributes:
        weights_bytes: all constants at the planned precision; one that several nodes read is counted once.
        activation_bytes: the largest sum of buffers alive at once at the planned precision. Attention is taken to be
            fused (no scores in memory), and elementwise operations to be done in place; engines add padding and
            scratch space.
        scores_bytes: what is added if the runtime does not fuse attention and writes out the scores.
        unknown_shapes: tensors whose shape the graph does not tell; they are counted as empty.
    """

    weights_bytes: int
    activation_bytes: int
    scores_bytes: int = 0
    unknown_shapes: int = 0

    @property
    def total_bytes(self) -> int:
        """Weights and activations."""
        return self.weights_bytes + self.activation_bytes


def footprint(model: ir.Model, *, precision: Precision, rest: Precision = "fp16") -> Footprint:
    """Estimate ``model``.

    Buffers live from the node that makes them to the last that reads them, in the graph's own order. A float graph that
    is to be quantised is counted as if it were: weights of convolutions and linear layers are one byte and a scale for
    each output channel, and so is a tensor that only such layers read. Where only weights are quantised, tensors stay
    float; INT4 weights of linear layers are half a byte and a scale for each 64 of them.

    Args:
        model: a graph with static shapes; those that are missing are inferred, which changes ``model``. Weights in
            external data are not read.
        precision: what it will be built in.
        rest: float type of what a quantised graph does not quantise.

    Raises:
        ModelError: the shapes contradict each other.
    """
    infer_missing_shapes(model)
    width = _float_bytes(precision, rest)
    quantised = any(node.op_type == "DequantizeLinear" for node in model.graph)
    planned = None if quantised or precision in FLOAT_BYTES else precision
    sizes = _Sizes(width, _one_byte_tensors(model, planned in QUANTISED))
    fused = _Buffers(model, sizes, _scores(model)).peak()
    unfused = _Buffers(model, sizes, frozenset()).peak()
    return Footprint(
        sum(_weights(model, width, planned).values()), fused, max(0, unfused - fused), sizes.unknown(model)
    )


def infer_missing_shapes(model: ir.Model) -> None:
    """Add the shapes and types a graph leaves out, in place; ``ModelError`` if they contradict each other."""
    from onnx_ir.passes.common import ShapeInferencePass

    from mtu_compile.core.errors import ModelError, first_line

    if all(value.shape is not None and value.dtype is not None for node in model.graph for value in node.outputs):
        return
    try:
        ShapeInferencePass()(model)
    except Exception as error:  # onnx and onnx_ir raise unrelated types for graphs they cannot follow
        raise ModelError(
            f"the shapes of the graph cannot be inferred: {first_line(error.__cause__ or error)}"
        ) from error


def stored_bytes(models: Iterable[ir.Model], *, precision: Precision, rest: Precision = "fp16") -> int:
    """Estimate the weights of graphs that were made from one, where those they have in common are stored once.

    Args:
        models: the graphs, float; their weights are not read.
        precision, rest: see ``footprint``.
    """
    width, planned = _float_bytes(precision, rest), None if precision in FLOAT_BYTES else precision
    found: dict[tuple[object, ...], int] = {}
    for model in models:
        found |= _weights(model, width, planned, _content)
    return sum(found.values())


def _float_bytes(precision: Precision, rest: Precision) -> int:
    return FLOAT_BYTES[rest if precision in (*QUANTISED, *WEIGHTS_ONLY) else precision]


def _place(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    """What tells a weight from the others of its graph: two names of one place in a weight file are one weight."""
    place = getattr(tensor, "location", None), getattr(tensor, "offset", None)
    return place if None not in place else (id(tensor),)


def _content(tensor: ir.TensorProtocol) -> tuple[object, ...]:
    """What tells a weight from those of other graphs of one export; what is yet to be computed is nobody else's."""
    import onnx_ir as ir

    place = _place(tensor)
    computed = isinstance(tensor, ir.LazyTensor)
    return place if len(place) > 1 or computed else (hashlib.sha256(tensor.tobytes()).digest(),)


def _weights(
    model: ir.Model,
    width: int,
    planned: Precision | None,
    identity: Callable[[ir.TensorProtocol], tuple[object, ...]] = _place,
) -> dict[tuple[object, ...], int]:
    """Bytes of each weight, by what tells it from others."""
    found: dict[tuple[object, ...], int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        elements = int(tensor.size)
        channels = None if planned is None else _quantised_channels(value)
        if channels is None:
            size = math.ceil(elements * _element_bytes(tensor.dtype, width))
        elif planned == "int4-weights" and (group := _int4_group(value, channels)):
            size = math.ceil(elements / 2) + elements // group * width
        else:
            size = elements + channels * width
        found.setdefault(identity(tensor), size)
    return found


def _int4_group(value: ir.Value, channels: int) -> int:
    """Weights of a linear layer that share an INT4 scale; 0 for what stays INT8: convolutions and odd sizes."""
    if value.shape is None or any(user.op_type == "Conv" for user in value.consumers()):
        return 0
    inputs = math.prod(value.shape.numpy()) // channels
    group = math.gcd(inputs, _INT4_GROUP)
    return group if group >= _INT4_LEAST_GROUP else 0


def _quantised_channels(value: ir.Value) -> int | None:
    """Output channels of a weight that every reader would quantise, else ``None``."""
    if value.shape is None or len(value.shape) < 2 or not _is_wide_float(value.dtype):
        return None
    readers = list(value.uses())
    if not readers or any(use.node.op_type not in _LAYERS or use.idx != 1 for use in readers):
        return None
    node = readers[0].node
    first = node.op_type == "Conv" or bool(node.op_type == "Gemm" and node.attributes.get_int("transB"))
    return value.shape.numpy()[0 if first else -1]


def _one_byte_tensors(model: ir.Model, planned: bool) -> frozenset[ir.Value]:
    """Floats that exist in one byte only: those that nothing but quantisers, or layers to be quantised, read."""
    found: set[ir.Value] = set()
    for node in reversed(model.graph):
        for value in node.outputs:
            uses = list(value.uses())
            if uses and not value.is_graph_output() and all(_reads_one_byte(*use, found, planned) for use in uses):
                found.add(value)
    return frozenset(found)


def _reads_one_byte(node: ir.Node, index: int, known: set[ir.Value], planned: bool) -> bool:
    if node.op_type == "QuantizeLinear":
        return index == 0
    if node.op_type in _MOVES and node.op_type != "DequantizeLinear":
        return index == 0 and node.outputs[0] in known
    if not planned or node.op_type not in _LAYERS or index != 0:
        return False
    weight = node.inputs[1]
    return weight is not None and weight.is_initializer() and _quantised_channels(weight) is not None


def _scores(model: ir.Model) -> frozenset[ir.Value]:
    """Attention scores and weights: what lies between the two products of an attention, around its softmax."""
    found: set[ir.Value] = set()
    for softmax in model.graph:
        if softmax.op_type != "Softmax":
            continue
        before, after = list(_chain(softmax, forward=False)), list(_chain(softmax, forward=True))
        if before and after and before[-1].producer() is not None:
            found.update(before, after)
    return frozenset(found)


def _chain(softmax: ir.Node, *, forward: bool) -> Iterator[ir.Value]:
    """Values from the softmax to the product on that side; none if there is no product."""
    values: list[ir.Value] = []
    value = softmax.outputs[0] if forward else softmax.inputs[0]
    while value is not None:
        values.append(value)
        node = next((use.node for use in value.uses()), None) if forward else value.producer()
        if node is None or (node.op_type != "MatMul" and node.op_type not in _BESIDE_SOFTMAX):
            return
        if node.op_type == "MatMul":
            yield from values
            return
        value = node.outputs[0] if forward else node.inputs[0]


def _is_wide_float(dtype: ir.DataType | None) -> bool:
    import onnx_ir as ir

    return dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def _element_bytes(dtype: ir.DataType, float_bytes: int) -> float:
    return float_bytes if _is_wide_float(dtype) else float(dtype.itemsize)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of a value. Float32 takes ``float_bytes``, except ``one_byte`` values; the others have their own size."""

    float_bytes: int
    one_byte: frozenset[ir.Value]

    def __call__(self, value: ir.Value) -> int:
        if value.shape is None or value.dtype is None or not value.shape.is_static():
            return 0
        width = 1 if value in self.one_byte else _element_bytes(value.dtype, self.float_bytes)
        return math.ceil(math.prod(value.shape.numpy()) * width)

    def unknown(self, model: ir.Model) -> int:
        values = (value for node in model.graph for value in node.outputs if value.name)
        return sum(value.shape is None or not value.shape.is_static() for value in values)


@dataclass
class _Buffers:
    """Which values share a buffer, and until when each is read.

    Attributes:
        unwritten: values that never reach memory.
    """

    model: ir.Model
    size: _Sizes
    unwritten: frozenset[ir.Value]
    _shared: dict[ir.Value, ir.Value] = field(default_factory=dict)
    _last: dict[ir.Value, int] = field(default_factory=dict)

    def peak(self) -> int:
        """Most bytes alive at once."""
        nodes = list(self.model.graph)
        inputs = [value for value in self.model.graph.inputs if not value.is_initializer()]
        constants = self._constants(nodes)
        last = self._last_reads(nodes)
        for index, node in enumerate(nodes):
            for output in node.outputs:
                source = None if output in constants else self._source(node, output, index, constants, last)
                if source is not None:
                    self._shared[output] = source
                    last[source] = max(last[source], last.get(output, index))
        ends: defaultdict[int, list[ir.Value]] = defaultdict(list)
        for value, index in last.items():
            ends[index].append(value)
        alive = {value: self.size(value) for value in inputs}
        total = peak = sum(alive.values())
        for index, node in enumerate(nodes):
            for output in node.outputs:
                if output in constants or output in self._shared or output in self.unwritten:
                    continue
                alive[output] = self.size(output)
                total += alive[output]
                if output not in last:
                    ends[index].append(output)
            peak = max(peak, total)
            for value in ends[index]:
                total -= alive.pop(value, 0)
        return peak

    def _constants(self, nodes: list[ir.Node]) -> set[ir.Value]:
        """What can be computed before the first inference: quantised weights, and shapes."""
        found = set(self.model.graph.initializers.values())
        for node in nodes:
            if all(value is None or value in found for value in node.inputs):
                found.update(node.outputs)
        return found

    def _last_reads(self, nodes: list[ir.Node]) -> dict[ir.Value, int]:
        last = {value: index for index, node in enumerate(nodes) for value in node.inputs if value is not None}
        last.update((value, len(nodes)) for value in self.model.graph.outputs)
        for node in reversed(nodes):
            # A buffer is read as long as any view of it, and what a fused attention reads until it is done.
            passed_on = node.inputs[:1] if node.op_type in _VIEWS else node.inputs
            if node.op_type not in _VIEWS and not any(value in self.unwritten for value in node.outputs):
                continue
            for value in passed_on:
                if value is not None and node.outputs[0] in last:
                    last[value] = max(last[value], last[node.outputs[0]])
        return last

    def _source(
        self, node: ir.Node, output: ir.Value, index: int, constants: set[ir.Value], last: dict[ir.Value, int]
    ) -> ir.Value | None:
        """The buffer ``output`` is written to, if it is one that exists already."""
        if node.op_type not in _VIEWS and (node.op_type not in _IN_PLACE or len(node.outputs) != 1):
            return None
        for value in node.inputs[:1] if node.op_type in _VIEWS else node.inputs:
            if value is None or value in constants:
                continue
            buffer = self._root(value)
            if node.op_type in _VIEWS:
                return buffer
            free = last.get(buffer) == index and buffer.producer() is not None
            if free and buffer not in self.unwritten and self.size(buffer) >= self.size(output) > 0:
                return buffer
        return None

    def _root(self, value: ir.Value) -> ir.Value:
        while value in self._shared:
            value = self._shared[value]
        return value
