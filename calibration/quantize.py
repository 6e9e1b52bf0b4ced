"""INT8 by NNCF: a static ONNX graph and calibration samples in, one symmetric Q/DQ graph for every target out.

What NNCF 3.4 does to a Stable Diffusion UNet with the settings used here (preset PERFORMANCE, model type TRANSFORMER):

* every convolution, every linear layer (MatMul, Gemm) of attention, feed-forwards and time embedding, and the
  query·key product become INT8: signed, symmetric, weights per output channel and stored as int8;
* the **attention·value product stays float** (a pattern the model type TRANSFORMER ignores), and so do softmax, norms
  and every other elementwise operation;
* SmoothQuant puts a Mul before linear layers, one for all the layers that share an input;
* a quantiser before a Reshape or Transpose serves the layer behind it, so a quantised layer's input may come from
  Transpose ← Reshape ← DequantizeLinear;
* activations that are never negative (after Relu or Softmax) become **uint8**, which TensorRT refuses: they are
  rewritten to int8 of the same range here, at the price of one of their 8 bits;
* biases stay float, and so do the tables that a graph for several tasks looks rows up in by the task: NNCF would take
  them for embeddings and quantise them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from calibration.merged import MergedSet, TaskCall, spread
from calibration.nncf_run import Feed, run_nncf
from calibration.nncf_weights import fold_weights
from calibration.quant_settings import QuantSettings
from mtu_compile.core.errors import CalibrationError, ConfigError, ModelError, PassError
from mtu_compile.graph import qdq
from mtu_compile.graph.qdq import LAYERS

if TYPE_CHECKING:
    import onnx

#: Name of the one dimension that may be dynamic, the first of an input.
BATCH: Literal["batch"] = "batch"


class HasInputs(Protocol):
    """A calibration set, of one task or merged of several: samples by input name under ``inputs``."""

    @property
    def inputs(self) -> Sequence[Feed]: ...


@dataclass(frozen=True)
class QuantisationReport:
    """What became of a graph.

    Attributes:
        settings: what was asked for.
        samples: calibration samples used.
        samples_by_task: how many of them are of which task, if they are of several.
        activations: QuantizeLinear/DequantizeLinear pairs on activations.
        weights: weights stored as int8 behind a DequantizeLinear.
        layers: by operation type, how many run in INT8 and how many there are.
        float_layers: names of the layers that stayed float, in graph order.
        bytes_before: weights and graph on disk before, in bytes.
        bytes_after: the same afterwards.
        tool: name and version of the quantiser.
    """

    settings: QuantSettings
    samples: int
    activations: int
    weights: int
    layers: Mapping[str, tuple[int, int]]
    float_layers: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    tool: str
    samples_by_task: Mapping[str, int] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """All Q/DQ pairs; a weight's Q is folded into its int8 values."""
        return self.activations + self.weights

    def to_json(self) -> dict[str, Any]:
        layers = {name: list(counts) for name, counts in self.layers.items()}
        own = {"settings": self.settings.to_json(), "layers": layers, "float_layers": list(self.float_layers)}
        return {**asdict(self), **own}


def quantize_onnx(
    model: Path,
    dataset: Iterable[Feed] | HasInputs,
    out: Path,
    *,
    settings: QuantSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> QuantisationReport:
    """Quantise the ONNX graph ``model``, static but perhaps for its batch, to symmetric INT8 and write it to ``out``.

    Args:
        model: ONNX file; external weights, which have to lie beside it, are read lazily.
        dataset: samples, each an array per graph input, or an object that has them as ``inputs``.
        out: ONNX file to write; above 256 MiB its weights go to ``out`` + ``.data`` beside it.
        settings: the defaults of ``QuantSettings`` if not given.
        progress: called with (samples run, samples to run) while the graph is calibrated.

    Raises:
        ModelError: the graph is unreadable, of dynamic shape, quantised already, or its weights lie outside its folder.
        CalibrationError: no samples, or samples that do not fit the graph's inputs, or are not finite.
        ConfigError: an ignored scope matches nothing.
        PassError: NNCF failed, or its result is not what every target takes (see ``verify``).
    """
    from mtu_compile.graph import io as graph_io

    settings = settings or QuantSettings()
    graph = load_float(model)
    before = graph_io.disk_bytes(model)
    samples = _pick(dataset, settings.subset_size)
    _check_samples(graph, samples)
    ignored = resolve_scopes(graph, settings.ignored_scopes)
    proto = run_nncf(graph, model, samples, (*ignored, *table_reads(graph)), settings, progress)
    quantised = graph_io.from_proto(proto, model.parent)
    fold_weights(quantised)
    qdq.sign_activations(quantised)
    qdq.drop_idle(quantised)
    layers, float_layers = qdq.verify(quantised)
    layer_names = {node.name for node in quantised.graph if node.op_type in LAYERS}
    if turned := sorted(set(ignored) & layer_names - set(float_layers)):
        raise PassError(f"nncf quantised {turned[0]!r}, which was to stay float")
    graph_io.check(quantised, "nncf")
    graph_io.save(quantised, out)
    activations, weights = qdq.count_pairs(quantised)
    after, tool = graph_io.disk_bytes(out), f"nncf {version('nncf')}"
    return QuantisationReport(
        settings,
        len(samples),
        activations,
        weights,
        layers,
        float_layers,
        before,
        after,
        tool,
        dict(Counter(sample.task for sample in samples if isinstance(sample, TaskCall))),
    )


def resolve_scopes(model: onnx.ModelProto, scopes: Sequence[str]) -> tuple[str, ...]:
    """Names of the nodes that ``scopes`` mean (see ``QuantSettings.ignored_scopes``).

    Raises:
        ConfigError: a scope matches no node, or is not a regular expression.
    """
    nodes = list(model.graph.node)
    matching: dict[str, None] = {}
    for scope in scopes:
        names = [n.name for n in nodes if n.name == scope] or [n.name for n in nodes if n.op_type == scope]
        try:
            names = names or [n.name for n in nodes if re.fullmatch(scope, n.name)]
        except re.error as error:
            raise ConfigError(f"ignored scope {scope!r} is not a regular expression: {error}") from error
        if not names:
            some = ", ".join(n.name for n in nodes if n.op_type in LAYERS)[:200]
            raise ConfigError(f"ignored scope {scope!r} matches no node of the graph", hint=f"its layers are {some} …")
        matching.update(dict.fromkeys(names))
    return tuple(matching)


def table_reads(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the nodes that look a row of a table up, as shared graphs do by the task.

    NNCF takes them for embeddings and quantises the table. These are small, and multiply or shift whole activations.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    return tuple(node.name for node in model.graph.node if node.op_type == "Gather" and node.input[0] in constants)


def load_float(path: Path) -> onnx.ModelProto:
    """The graph without its external weights; ``ModelError`` for everything that cannot be quantised."""
    from mtu_compile.graph import io as graph_io

    model = graph_io.load_proto(path)
    for location in graph_io.weight_files(model):
        # NNCF takes the file's name only, whatever folder the graph names; be strict, so that both mean the same file.
        if location != Path(location).name or (path.parent / location).is_symlink():
            raise ModelError(f"weights of {path.name} do not lie right beside it, but at {location!r}")
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            raise ModelError(f"{path.name} is quantised already ({node.name or node.op_type})")
    for value in model.graph.input:
        if any(size is None for size in _shape(value)):
            raise ModelError(f"input {value.name!r} of {path.name} has a dynamic shape", hint="freeze the shapes first")
    return model


def _shape(value: onnx.ValueInfoProto) -> tuple[int | Literal["batch"] | None, ...]:
    """The dimensions of an input; ``None`` for one that is dynamic and not the batch."""
    dims = enumerate(value.type.tensor_type.shape.dim)
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else BATCH if axis == 0 and dim.dim_param == BATCH else None
        for axis, dim in dims
    )


def _pick(dataset: Iterable[Feed] | HasInputs, subset_size: int | None) -> list[Feed]:
    """``subset_size`` samples, all of them if it is ``None``."""
    if isinstance(dataset, MergedSet):
        return list(dataset.inputs if subset_size is None else dataset.subset(subset_size))
    feeds: Iterable[Feed] = getattr(dataset, "inputs", dataset)  # type: ignore[arg-type]
    everything = list(feeds)
    return everything if subset_size is None else spread(everything, subset_size)


def _check_samples(model: onnx.ModelProto, samples: Sequence[Feed]) -> None:
    from onnx import helper

    if not samples:
        raise CalibrationError("the calibration set is empty", hint="capture samples of this task first")
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in constants}
    for index, sample in enumerate(samples):
        if differing := sorted(set(sample) ^ set(inputs)):
            where = "the graph has no such input" if differing[0] in sample else "the sample lacks it"
            raise CalibrationError(f"calibration sample {index}: {differing[0]!r}: {where}")
        batch = None  # the same for all inputs of a sample, whatever it is
        for name, value in inputs.items():
            array, wanted = sample[name], _shape(value)
            if batch is None and BATCH in wanted and array.ndim == len(wanted):
                batch = array.shape[0]
            shape = tuple(batch if size == BATCH else size for size in wanted)
            dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            if array.shape != shape or array.dtype != dtype:
                kinds = f"{array.dtype}{list(array.shape)}, not {dtype}{list(shape)}"
                raise CalibrationError(f"calibration sample {index}: {name!r} is {kinds}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CalibrationError(f"calibration sample {index}: {name!r} has NaN or Inf values")
