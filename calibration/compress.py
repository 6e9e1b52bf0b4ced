"""Weights in INT8 or INT4 by NNCF, activations float: for boards that are short of memory rather than of arithmetic.

Needs no calibration data. NNCF 3.4 decides which weight becomes what and rounds it: in INT8 every convolution and
every linear layer, one scale an output channel; in INT4 linear layers (MatMul, Gemm) in blocks of ``group_size`` along
their input, and convolutions, the last linear layer and what does not divide into blocks stay INT8. Tables that rows
are looked up in are kept from it, as in ``calibration.quantize``. What it writes is then put right, because no target
takes it as it is:

* scales of convolutions have three dimensions, which ONNX does not know (OpenVINO refuses them): they get one;
* blocks of a transposed Gemm are said to lie along the wrong axis;
* where the largest weight of a group is positive its **scale is negative**, which TensorRT refuses: the group is
  rounded again with a positive one, 127 or 7 steps to either side instead of 128 or 8;
* zero points are left away, from whose type TensorRT and ``mtu_compile.graph.qdq`` know the weight's: they are
  written down.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from calibration.nncf_run import quiet_nncf
from calibration.quantize import load_float, resolve_scopes, table_reads
from mtu_compile.core.errors import ConfigError, PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Mode = Literal["int8", "int4"]

#: First opset, and ONNX file format, with 4-bit integers and DequantizeLinear by blocks.
INT4_OPSET, INT4_IR_VERSION = 21, 10

#: What means something else from opset 21 on; the other operators of a UNet only got more types (ONNX changelog).
_CHANGED_IN_21 = ("GroupNormalization",)

#: NNCF takes smaller blocks, down to this, for a layer that the wanted size does not divide.
LEAST_GROUP = 32


@dataclass(frozen=True)
class CompressSettings:
    """How weights are compressed.

    Attributes:
        mode: what most weights become; ``"int4"`` is INT4 mixed with INT8.
        ratio: share of the linear layers' weights that become INT4, 0 to 1; NNCF leaves those in INT8 that it takes for
            the most sensitive, judged by the rounding errors of the weights alone. Of no use in INT8.
        group_size: weights along a layer's input that share an INT4 scale: a power of two, at least 32. 64 divides
            every linear layer of Stable Diffusion's UNets, 128 does not.
        ignored_scopes: what stays float, as in ``calibration.quant_settings.QuantSettings``.
    """

    mode: Mode = "int8"
    ratio: float = 1.0
    group_size: int = 64
    ignored_scopes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("int8", "int4"):
            raise ConfigError(f"weights cannot be compressed to {self.mode!r}", hint="int8 or int4")
        if not 0 <= self.ratio <= 1:
            raise ConfigError(f"INT4 ratio {self.ratio} is not between 0 and 1")
        if self.group_size < LEAST_GROUP or self.group_size & (self.group_size - 1):
            raise ConfigError(f"group size {self.group_size} is not a power of two of at least {LEAST_GROUP}")

    def to_json(self) -> dict[str, Any]:
        own: dict[str, Any] = {"mode": self.mode, "ignored_scopes": list(self.ignored_scopes)}
        return own if self.mode == "int8" else {**own, "ratio": self.ratio, "group_size": self.group_size}


@dataclass(frozen=True)
class CompressionReport:
    """What became of a graph.

    Attributes:
        settings: what was asked for.
        layers: by operation type, how many layers have weights of each type (``{"Conv": {"int8": 50}}``).
        parameters: by type, how many numbers the weights of layers have in it.
        rounded_again: groups whose scale NNCF had made negative.
        bytes_before: weights and graph on disk before, in bytes.
        bytes_after: the same afterwards.
        tool: name and version of the compressor.
    """

    settings: CompressSettings
    layers: Mapping[str, Mapping[str, int]]
    parameters: Mapping[str, int]
    rounded_again: int
    bytes_before: int
    bytes_after: int
    tool: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "settings": self.settings.to_json()}


def compress_onnx(model: Path, out: Path, *, settings: CompressSettings | None = None) -> CompressionReport:
    """Compress the weights of the static float graph ``model`` and write it to ``out``.

    *Given*::

        c = Conv(x, w float32 [O, I, 3, 3]); y = MatMul(h, v float32 [K, N])

    *Result* (INT4)::

        c = Conv(x, DequantizeLinear(w int8, s [O], 0, axis 0))
        y = MatMul(h, DequantizeLinear(v int4, t [K / 64, N], 0, axis 0, block size 64))

    Args:
        model: ONNX file; external weights, which have to lie beside it, are read lazily.
        out: ONNX file to write; above 256 MiB its weights go to ``out`` + ``.data`` beside it. INT4 raises the opset
            to 21.
        settings: the defaults of ``CompressSettings`` if not given.

    Raises:
        ModelError: the graph is unreadable, of dynamic shape, quantised already, or its weights lie outside its folder.
        ConfigError: an ignored scope matches nothing.
        PassError: NNCF failed, there is no weight to compress, or an operator means something else in opset 21.
    """
    settings = settings or CompressSettings()
    proto = load_float(model)
    before = graph_io.disk_bytes(model)
    ignored = (*resolve_scopes(proto, settings.ignored_scopes), *table_reads(proto))
    if settings.mode == "int4":
        _raise_opset(proto)
    compressed = _put_right(_run_nncf(proto, model, settings, ignored), model)
    graph_io.check(compressed.graph, "nncf")
    graph_io.save(compressed.graph, out)
    layers, parameters = _count(compressed.graph)
    after, tool = graph_io.disk_bytes(out), f"nncf {version('nncf')}"
    return CompressionReport(settings, layers, parameters, compressed.rounded_again, before, after, tool)


def _raise_opset(proto: onnx.ModelProto) -> None:
    default = next(one for one in proto.opset_import if one.domain in ("", "ai.onnx"))
    if default.version >= INT4_OPSET:
        return
    for node in proto.graph.node:
        if node.op_type in _CHANGED_IN_21:
            raise PassError(f"node {node.name!r} means something else in opset {INT4_OPSET}, which INT4 needs")
    default.version = INT4_OPSET
    proto.ir_version = max(proto.ir_version, INT4_IR_VERSION)


def _run_nncf(
    proto: onnx.ModelProto, path: Path, settings: CompressSettings, ignored: tuple[str, ...]
) -> onnx.ModelProto:
    with quiet_nncf():
        import nncf
        from nncf.onnx.quantization.backend_parameters import BackendParameters
        from nncf.parameters import SensitivityMetric
        from nncf.quantization.advanced_parameters import AdvancedCompressionParameters, GroupSizeFallbackMode

        advanced = AdvancedCompressionParameters(
            group_size_fallback_mode=GroupSizeFallbackMode.ADJUST,
            min_adjusted_group_size=LEAST_GROUP,
            backend_params={BackendParameters.EXTERNAL_DATA_DIR: str(path.parent.resolve())},
        )
        options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_SYM}
        # NNCF takes a ratio of 0 for none given, which means 1.
        if settings.mode == "int4" and settings.ratio:
            options = {
                "mode": nncf.CompressWeightsMode.INT4_SYM,
                "backup_mode": nncf.BackupMode.INT8_SYM,
                "ratio": settings.ratio,
                "group_size": settings.group_size,
                "sensitivity_metric": SensitivityMetric.WEIGHT_QUANTIZATION_ERROR,
            }
        if ignored:
            options["ignored_scope"] = nncf.IgnoredScope(names=list(ignored))
        # The decorator around nncf.compress_weights reports every call to its vendor's analytics service.
        compress = getattr(nncf.compress_weights, "__wrapped__", nncf.compress_weights)
        try:
            return compress(proto, advanced_parameters=advanced, **options)
        except MemoryError:
            raise
        except Exception as error:  # NNCF and ONNX each have their own
            raise PassError(f"nncf cannot compress {path.name}: {error}") from error


@dataclass(frozen=True)
class _Compressed:
    graph: ir.Model
    rounded_again: int


def _put_right(proto: onnx.ModelProto, path: Path) -> _Compressed:
    """Make NNCF's result one that every target takes; see the head of this file. ``path`` has the float weights."""
    import onnx_ir as ir

    graph: ir.Model = ir.from_proto(proto)
    original = graph_io.load(path).graph.initializers
    weights = [node for node in graph.graph if node.op_type == "DequantizeLinear"]
    if not weights:
        raise PassError("no weight was compressed", hint="the ignored scopes cover every layer, or the graph has none")
    again = 0
    for node in weights:
        source = node.inputs[0]
        name = (source.name if source is not None else None) or ""
        weight = original.get(name.removesuffix("_quantized"))
        if weight is None or weight.const_value is None:
            raise PassError(f"nncf compressed {name!r}, which is no weight of {path.name}")
        again += _put_weight_right(graph, node, weight.const_value)
    return _Compressed(graph, again)


def _put_weight_right(graph: ir.Model, node: ir.Node, weight: ir.TensorProtocol) -> int:
    """The same for one weight; returns how many of its groups were rounded again."""
    import onnx_ir as ir

    source, scale = node.inputs[0], node.inputs[1]
    packed, scales = qdq.constant(source), qdq.constant(scale)
    assert source is not None and scale is not None and packed is not None and scales is not None
    block = node.attributes.get_int("block_size", 0)
    inner = _input_axis(node)
    numbers: NDArray[Any] = scales.numpy().astype(np.float32)
    if block:
        axis, spread = inner, np.repeat(numbers, block, axis=inner)
    else:
        axis = 0 if inner else 1  # the other one; of convolutions, whose inner axis is 1, the first
        numbers = numbers.reshape(-1)
        spread = numbers.reshape([-1 if d == axis else 1 for d in range(len(packed.shape))])
        node.attributes.pop("block_size", None)
    node.attributes["axis"] = ir.AttrInt64("axis", axis)
    most = 7 if packed.dtype == ir.DataType.INT4 else 127
    negative = numbers < 0
    if negative.any():
        wider = np.float32(-(most + 1) / most)
        rounded = np.clip(np.rint(graph_io.read_weight(weight) / (spread * wider)), -most, most)
        integers = np.where(spread < 0, rounded, packed.numpy().astype(np.float32))
        source.const_value = ir.Tensor(integers.astype(packed.dtype.numpy()), dtype=packed.dtype, name=source.name)
        numbers = np.where(negative, numbers * wider, numbers)
    scale.const_value = ir.tensor(numbers, name=scale.name)
    scale.shape = ir.Shape(numbers.shape)
    zero = ir.Value(name=f"{source.name}.zero_point", shape=scale.shape, type=ir.TensorType(packed.dtype))
    zero.const_value = ir.Tensor(np.zeros(numbers.shape, packed.dtype.numpy()), dtype=packed.dtype, name=zero.name)
    graph.graph.register_initializer(zero)
    node.resize_inputs(3)
    node.replace_input_with(2, zero)
    return int(negative.sum())


def _input_axis(node: ir.Node) -> int:
    """The axis of a weight that the layer sums over; of a convolution, its input channels'."""
    found = set()
    packed = qdq.constant(node.inputs[0])
    rank = 0 if packed is None else packed.shape.rank()
    for layer, place in node.outputs[0].uses():
        if layer.op_type == "Conv" and place == 1:
            found.add(1)
        elif layer.op_type in ("MatMul", "Gemm") and rank == 2:
            transposed = bool(layer.attributes.get_int("transB" if place == 1 else "transA", 0))
            found.add(int((place == 1) == transposed))
        else:
            raise PassError(f"nncf compressed input {place} of {layer.name!r}, a {layer.op_type}")
    if len(found) != 1:
        raise PassError(f"weight {node.inputs[0].name!r} is read along different axes")  # type: ignore[union-attr]
    return found.pop()


def _count(graph: ir.Model) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Layers and numbers of weights, by type; raises ``PassError`` for what no target takes."""
    import onnx_ir as ir

    layers: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    parameters: defaultdict[str, int] = defaultdict(int)
    seen: set[ir.Value] = set()
    for node in graph.graph:
        if node.op_type not in qdq.LAYERS:
            continue
        for value in node.inputs[:2]:
            producer = value.producer() if value is not None else None
            stored = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else value
            tensor = qdq.constant(stored)
            if tensor is None or stored is None:
                continue
            if producer is not None:
                qdq.check_quantiser(producer, (qdq.INT8, ir.DataType.INT4))
            kind = tensor.dtype.name.lower()
            layers[node.op_type][kind] += 1
            parameters[kind] += 0 if stored in seen else int(tensor.size)
            seen.add(stored)
    return {name: dict(kinds) for name, kinds in layers.items()}, dict(parameters)
