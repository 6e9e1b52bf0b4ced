"""``mtu::to-fp16`` and ``mtu::to-bf16``: a float32 graph becomes a strongly typed one of half precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import Array, constant_tensor, produced_by, remove_unused, users
from passes.base import TASK_PIPELINE, PassContext, PassResult, Skipped
from passes.folding import SMALL
from passes.keep_float import FIXED_INPUTS, FLOAT, KEEP, QUANTISERS, Rule, float_inputs, float_outputs, stays_float

#: First opset whose Conv and InstanceNormalization take bfloat16; what changed from 20 to 22 are types only, but for
#: the operators below.
BF16_OPSET = 22

_CHANGED_IN_22 = ("GroupNormalization", "EyeLike")

#: Smallest number of float16 that has all its bits, and the smallest at all.
FP16_NORMAL = 2.0**-14
FP16_LEAST = 2.0**-24

#: Largest numbers of symmetric integer weights.
_MOST = {ir.DataType.INT8: 127, ir.DataType.INT4: 7}

#: A scale that rounds to half precision further off than this (fp16 below 2⁻¹⁴ only) takes its integers along: it is
#: what bfloat16 rounds by.
_SCALE_ERROR = 2.0**-8


class ToHalf:
    """Let every float32 value be of half precision, but for what has to stay.

    *Given*::

        sample f32 → a = Conv(sample, w f32) → n = InstanceNormalization(a) → y = Sigmoid(n) → y f32

    *Result*::

        sample f32 → s = Cast(sample) → a = Conv(s, w f16) → c = Cast(a) → n = InstanceNormalization(c)
                   → h = Cast(n) → t = Sigmoid(h) → y = Cast(t) → y f32

    Fires on

    1. weights and other float32 constants: they keep their name and are converted when they are written;
    2. nodes that read or make float32 values; Casts are placed where the type changes, one for all who read a value;
    3. QuantizeLinear and DequantizeLinear with float32 scales: the scale becomes half, so that DequantizeLinear makes
       half. Both sides of a quantiser get the rounded scale, also where one of them stays float32. A weight's scale
       so small that it would lose more than 2⁻⁸ of itself is rounded up and its integers are rescaled;
    4. float32's lowest number, which masks attention: it becomes the lowest of the new type instead of -inf.

    Does not fire on

    1. inputs and outputs of the graph, which stay float32, nor on integers, truth values and float64;
    2. the nodes that ``passes.keep_float.KEEP`` finds;
    3. a node that reads a constant above the new type's range;
    4. nodes of other domains, and operators that make float32 from nothing.

    ``skipped`` names the nodes of 3 and the weights that have numbers too small for the new type. A constant that
    nodes of both types read is stored twice up to 4096 numbers, and above that once, in float32. bfloat16 raises the
    opset to 22, the first whose convolutions take it. Refuses (``PassError``) subgraphs (If, Loop, Scan) and functions.
    """

    after: tuple[str, ...] = (*TASK_PIPELINE, "mtu::legalise-qdq")

    def __init__(self, name: str, dtype: ir.DataType, keep: Mapping[str, Rule] = KEEP) -> None:
        self.id = name
        self.dtype = dtype
        self.keep = keep

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        if graph.functions:
            raise PassError("the graph has functions", hint="inline them first")
        for node in graph.graph:
            if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
                raise PassError(f"node {node.name!r} is a {node.op_type}: it has a graph of its own")
            if self._raises_opset(graph) and node.op_type in _CHANGED_IN_22:
                raise PassError(f"node {node.name!r} means something else in opset {BF16_OPSET}, which bfloat16 needs")

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        if any(value.dtype is None for node in graph.graph for value in node.outputs if value.name):
            ShapeInferencePass()(graph)
        skipped: list[Skipped] = []
        constants = _Constants(graph, self.dtype)
        keep = {node for rule in self.keep.values() for node in rule(graph)}
        for node in graph.graph:
            if node not in keep and (name := constants.overflowing(node)):
                keep.add(node)
                skipped.append(Skipped(node.name or "", f"{name!r} has numbers above {_short(self.dtype)}'s range"))
        stays = stays_float(graph, keep)
        half = [n for n in graph.graph if n not in stays and (float_inputs(n) or float_outputs(n))]
        if not half:
            return PassResult(self.id, graph, 0, tuple(skipped))
        constants.convert_scales(half)
        for node in half:
            for place, value in float_inputs(node):
                if constant_tensor(value) is not None:
                    node.replace_input_with(place, constants.half(value, stays))
        changed = dict.fromkeys(value for node in half for value in float_outputs(node))
        for value in changed:
            value.type = ir.TensorType(self.dtype)
        for node in half:
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", self.dtype.value)
        _cast_where_types_meet(graph, half, changed, self.dtype)
        if self._raises_opset(graph):
            graph.opset_imports[""] = graph.graph.opset_imports[""] = BF16_OPSET
        remove_unused(graph)
        skipped += constants.underflows
        return PassResult(self.id, graph, len(half), tuple(skipped))

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        for value in (*graph.graph.inputs, *graph.graph.outputs):
            if value.dtype == self.dtype:
                raise PassError(f"{self.id} changed the type of {value.name!r}, which the runtime feeds or reads")
        for node in graph.graph:
            before = produced_by(node.inputs[0], "Cast") if node.op_type == "Cast" else None
            source = before.inputs[0] if before is not None else None
            if source is not None and source.dtype == node.outputs[0].dtype:
                raise PassError(f"{self.id} casts there and back again at {node.name!r}")

    def _raises_opset(self, graph: ir.Model) -> bool:
        return self.dtype == ir.DataType.BFLOAT16 and graph.opset_imports.get("", 0) < BF16_OPSET


def to_fp16(keep: Mapping[str, Rule] = KEEP) -> ToHalf:
    """``mtu::to-fp16``."""
    return ToHalf("mtu::to-fp16", ir.DataType.FLOAT16, keep)


def to_bf16(keep: Mapping[str, Rule] = KEEP) -> ToHalf:
    """``mtu::to-bf16``."""
    return ToHalf("mtu::to-bf16", ir.DataType.BFLOAT16, keep)


def _cast_where_types_meet(
    graph: ir.Model, half: list[ir.Node], changed: dict[ir.Value, None], dtype: ir.DataType
) -> None:
    """Put one Cast behind every value that somebody reads in the other type."""
    for value in list(graph.graph.outputs):
        if value in changed:
            # The name belongs to the output: what computes it gets another.
            output = ir.Value(name=value.name, type=ir.TensorType(FLOAT), shape=value.shape)
            readers = list(value.uses())
            ir.convenience.replace_all_uses_with(value, output, replace_graph_outputs=True)
            for user, place in readers:
                user.replace_input_with(place, value)
            value.name = f"{value.name}.{_short(dtype)}"
            _insert_cast(graph, value, output, FLOAT)
    halves = set(half)
    to_half: dict[ir.Value, ir.Value] = {}
    for node in half:
        for place, value in float_inputs(node):
            if value not in to_half:
                to_half[value] = _cast(graph, value, dtype)
            node.replace_input_with(place, to_half[value])
    to_float: dict[ir.Value, ir.Value] = {}
    for value in changed:
        for node, place in list(value.uses()):
            if node in halves or node.op_type == "Cast":
                continue
            if value not in to_float:
                to_float[value] = _existing_cast(value) or _cast(graph, value, FLOAT)
            node.replace_input_with(place, to_float[value])


def _existing_cast(value: ir.Value) -> ir.Value | None:
    """The float32 form of a value that is an output already."""
    casts = (user.outputs[0] for user in users(value) if user.op_type == "Cast" and user.outputs[0].dtype == FLOAT)
    return next(casts, None)


def _cast(graph: ir.Model, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    cast = ir.Value(name=f"{value.name}.{_short(dtype)}", type=ir.TensorType(dtype), shape=value.shape)
    _insert_cast(graph, value, cast, dtype)
    return cast


def _insert_cast(graph: ir.Model, source: ir.Value, target: ir.Value, dtype: ir.DataType) -> None:
    name = f"{source.name}/Cast_{_short(dtype)}"
    node = ir.Node("", "Cast", [source], [ir.AttrInt64("to", dtype.value)], outputs=[target], name=name)
    producer = source.producer()
    if producer is not None:
        graph.graph.insert_after(producer, node)
    else:
        graph.graph.insert_before(graph.graph[0], node)


def _short(dtype: ir.DataType) -> str:
    return {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}[dtype.name]


@dataclass
class _Constants:
    """The float32 constants of one graph on their way to half precision."""

    graph: ir.Model
    dtype: ir.DataType
    underflows: list[Skipped] = field(default_factory=list)
    _limits: dict[ir.Value, tuple[bool, int]] = field(default_factory=dict)
    _converted: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def overflowing(self, node: ir.Node) -> str | None:
        """Name of a constant that ``node`` reads and that the type cannot hold."""
        names = (v.name or "" for _, v in float_inputs(node) if constant_tensor(v) is not None and self._scan(v)[0])
        return next(names, None)

    def half(self, value: ir.Value, stays: set[ir.Node]) -> ir.Value:
        """The constant in half precision: the same value, a second one, or a Cast of it."""
        if value.dtype != FLOAT:
            return value
        if value in self._converted:
            return self._converted[value]
        tensor = constant_tensor(value)
        assert tensor is not None
        _, lost = self._scan(value)
        if lost:
            reason = f"{lost} of {tensor.size} numbers are too small for {_short(self.dtype)} and become 0"
            self.underflows.append(Skipped(value.name or "", reason))
        shared = any(user in stays or place in FIXED_INPUTS.get(user.op_type, ()) for user, place in value.uses())
        if shared and tensor.size > SMALL:
            return value  # a Cast follows
        if shared:
            new = ir.Value(name=f"{value.name}.{_short(self.dtype)}", shape=value.shape)
            self._store(new, tensor)
            self.graph.graph.register_initializer(new)
            self._converted[value] = new
            return new
        self._store(value, tensor)
        return value

    def convert_scales(self, half: list[ir.Node]) -> None:
        """Round the scales of quantisers of which one side becomes half precision."""
        nodes = [node for node in half if node.op_type in QUANTISERS]
        for value in dict.fromkeys(node.inputs[1] for node in nodes):
            tensor = constant_tensor(value)
            if value is None or tensor is None or value in self._converted:
                continue
            scale = tensor.numpy()
            readers = [node for node in users(value) if node.op_type in QUANTISERS]
            weights = [node for node in readers if _has_own_integers(node)]
            rounded = self._round_scale(scale, weights=len(weights) == len(readers))
            if len(weights) == len(readers) and _off(rounded, scale).any():
                for node in weights:
                    _requantise(node, scale, rounded.astype(np.float64))
            # Those that stay float32 read the rounded scale in float32.
            floats = [(user, place) for user, place in value.uses() if user not in half]
            if floats:
                wide = ir.Value(name=f"{value.name}.fp32", type=ir.TensorType(FLOAT), shape=value.shape)
                wide.const_value = ir.tensor(rounded.astype(np.float32), name=wide.name)
                self.graph.graph.register_initializer(wide)
                for user, place in floats:
                    user.replace_input_with(place, wide)
            value.const_value = ir.tensor(rounded, dtype=self.dtype, name=value.name)
            value.type = ir.TensorType(self.dtype)

    def _round_scale(self, scale: Array, *, weights: bool) -> Array:
        half = self.dtype.numpy()
        rounded: Array = scale.astype(half)
        if self.dtype != ir.DataType.FLOAT16:
            return rounded
        if not weights:
            # An activation's quantiser divides by its scale: 1/scale has to be finite, too.
            return np.maximum(rounded, np.float16(FP16_NORMAL))
        up = np.where(rounded.astype(np.float64) < scale, np.nextafter(rounded, np.float16(np.inf)), rounded)
        return np.where(_off(rounded, scale), np.maximum(up, np.float16(FP16_LEAST)), rounded)

    def _scan(self, value: ir.Value) -> tuple[bool, int]:
        """Whether a constant has numbers above the type's range, and how many of it would become 0."""
        if value not in self._limits:
            array = self._read(constant_tensor(value))
            finite = np.isfinite(array) & (array != np.finfo(np.float32).min)
            cast = _rounded(array, self.dtype)
            overflows = bool((finite & ~np.isfinite(cast)).any())
            self._limits[value] = overflows, int(np.count_nonzero((cast == 0) & (array != 0)))
        return self._limits[value]

    def _store(self, value: ir.Value, tensor: ir.TensorProtocol) -> None:
        def convert() -> ir.TensorProtocol:
            array = self._read(tensor)
            masked = array == np.finfo(np.float32).min
            cast = _rounded(array, self.dtype)
            cast[masked] = _lowest(self.dtype)
            return ir.Tensor(cast, dtype=self.dtype)

        shape = ir.Shape(tensor.shape.numpy())
        value.const_value = ir.LazyTensor(convert, dtype=self.dtype, shape=shape, name=value.name)
        value.type = ir.TensorType(self.dtype)

    def _read(self, tensor: ir.TensorProtocol | None) -> Array:
        """A weight as it is; if it lies in a file, the file is let go of again."""
        assert tensor is not None
        array: Array = tensor.numpy()
        if isinstance(tensor, ir.ExternalTensor):
            array = array.copy()
            tensor.release()
        return array


def _rounded(array: Array, dtype: ir.DataType) -> Array:
    with np.errstate(over="ignore"):  # infinities are looked for where they matter
        return array.astype(dtype.numpy())


def _lowest(dtype: ir.DataType) -> float:
    """Lowest finite number of a half type."""
    return -65504.0 if dtype == ir.DataType.FLOAT16 else -(2.0**127) * (2 - 2.0**-7)


def _off(rounded: Array, scale: Array) -> Array:
    """Where a scale was rounded too far off."""
    return np.abs(rounded.astype(np.float64) - scale) > _SCALE_ERROR * np.abs(scale)


def _has_own_integers(node: ir.Node) -> bool:
    """Whether a quantiser holds an integer weight that nothing else reads."""
    source = node.inputs[0]
    tensor = constant_tensor(source)
    return tensor is not None and tensor.dtype in _MOST and source is not None and len(source.uses()) == 1


def _requantise(node: ir.Node, old: Array, new: Array) -> None:
    """Express the integers of a weight in other scales; ``new`` is nowhere much smaller than ``old``."""
    value = node.inputs[0]
    tensor = constant_tensor(value)
    assert value is not None and tensor is not None
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    factor = old / new
    if block:
        factor = np.repeat(factor, block, axis)
    elif old.ndim:
        shape = [1] * len(tensor.shape)
        shape[axis] = -1
        factor = np.reshape(factor, shape)
    most = _MOST[tensor.dtype]
    integers = np.clip(np.rint(tensor.numpy().astype(np.float64) * factor), -most, most).astype(tensor.dtype.numpy())
    value.const_value = ir.Tensor(integers, dtype=tensor.dtype, name=value.name)
