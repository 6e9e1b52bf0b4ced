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
* biases stay float.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calibration.qdq import LAYERS, count_pairs, drop_idle, sign_activations, verify
from mtu_compile.core.errors import CalibrationError, ConfigError, ModelError, PassError

if TYPE_CHECKING:
    import onnx

Feed = Mapping[str, NDArray[Any]]


#: Range estimators of activations, by NNCF's name for them (``RangeEstimatorParametersSet``).
RANGE_ESTIMATORS = {
    "minmax": "MINMAX",
    "mean-minmax": "MEAN_MINMAX",
    "median-minmax": "MEDIAN_MINMAX",
    "histogram": "HISTOGRAM",
}


class HasInputs(Protocol):
    """A calibration set: samples by input name under ``inputs``."""

    @property
    def inputs(self) -> Sequence[Feed]: ...


@dataclass(frozen=True)
class QuantSettings:
    """How a graph is quantised.

    Attributes:
        subset_size: calibration samples used, spread evenly over the set; ``None`` for all of them.
        smooth_quant_alpha: SmoothQuant's migration strength of linear layers, 0 to 1; ``None`` switches it off. 0.95 is
            NNCF's default for transformers.
        range_estimator: what becomes of an activation's values over the samples: one of ``RANGE_ESTIMATORS``. NNCF's
            default is the mean of the samples' extremes; a histogram whose range costs the least squared error is
            better where timesteps differ much (emoji example, text-to-image: worst call 26.3 dB instead of 21.2).
        weight_bits_fix: NNCF's overflow fix: the first layers' weights lose a bit, for CPUs that add products of 8 bits
            in 16 (AVX2 without VNNI). Everything this project builds for adds them in 32.
        fast_bias_correction: correct biases for the shift that quantised weights cause. ``False`` leaves them alone
            (NNCF's slow correction, which it would fall back to, breaks ONNX graphs after SmoothQuant: 3.4.0).
        ignored_scopes: what stays float: names of nodes, operation types, or regular expressions that match whole
            node names, looked up in this order. One that matches nothing is an error.
    """

    subset_size: int | None = None
    smooth_quant_alpha: float | None = 0.95
    range_estimator: str = "mean-minmax"
    weight_bits_fix: bool = False
    fast_bias_correction: bool = True
    ignored_scopes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.subset_size is not None and self.subset_size < 1:
            raise ConfigError(f"subset size {self.subset_size} is not at least 1")
        if self.smooth_quant_alpha is not None and not 0 <= self.smooth_quant_alpha <= 1:
            raise ConfigError(f"smooth-quant alpha {self.smooth_quant_alpha} is not between 0 and 1")
        if self.range_estimator not in RANGE_ESTIMATORS:
            known = ", ".join(RANGE_ESTIMATORS)
            raise ConfigError(f"there is no range estimator {self.range_estimator!r}", hint=f"known: {known}")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ignored_scopes": list(self.ignored_scopes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantSettings:
        """The inverse of ``to_json``; ``ConfigError`` naming what is unknown or of the wrong kind."""
        kinds: dict[str, tuple[type, ...]] = {
            "subset_size": (int, NoneType),
            "smooth_quant_alpha": (int, float, NoneType),
            "range_estimator": (str,),
            "weight_bits_fix": (bool,),
            "fast_bias_correction": (bool,),
            "ignored_scopes": (list,),
        }
        for name, value in data.items():
            if name not in kinds:
                raise ConfigError(f"unknown setting {name!r}", hint=f"known: {', '.join(kinds)}")
            strings = name != "ignored_scopes" or (isinstance(value, list) and all(type(v) is str for v in value))
            if type(value) not in kinds[name] or not strings:
                raise ConfigError(f"setting {name!r} is {value!r}, which is not what belongs there")
        return cls(**{**data, "ignored_scopes": tuple(data.get("ignored_scopes", ()))})


@dataclass(frozen=True)
class QuantisationReport:
    """What became of a graph.

    Attributes:
        settings: what was asked for.
        samples: calibration samples used.
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
    """Quantise the static ONNX graph ``model`` to symmetric INT8 and write it to ``out``.

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
    feeds: Iterable[Feed] = getattr(dataset, "inputs", dataset)  # type: ignore[arg-type]
    samples = _pick(feeds, settings.subset_size)
    _check_samples(graph, samples)
    ignored = resolve_scopes(graph, settings.ignored_scopes)
    quantised = _run_nncf(graph, model, samples, ignored, settings, progress)
    sign_activations(quantised)
    drop_idle(quantised)
    layers, float_layers = verify(quantised)
    layer_names = {node.name for node in quantised.graph.node if node.op_type in LAYERS}
    if turned := sorted(set(ignored) & layer_names - set(float_layers)):
        raise PassError(f"nncf quantised {turned[0]!r}, which was to stay float")
    _save(quantised, out)
    activations, weights = count_pairs(quantised)
    after, tool = graph_io.disk_bytes(out), f"nncf {version('nncf')}"
    return QuantisationReport(settings, len(samples), activations, weights, layers, float_layers, before, after, tool)


def resolve_scopes(model: onnx.ModelProto, scopes: Sequence[str]) -> tuple[str, ...]:
    """Names of the nodes that ``scopes`` mean (see ``QuantSettings.ignored_scopes``).

    Raises:
        ConfigError: a scope matches no node, or is not a regular expression.
    """
    nodes = list(model.graph.node)
    found: dict[str, None] = {}
    for scope in scopes:
        names = [n.name for n in nodes if n.name == scope] or [n.name for n in nodes if n.op_type == scope]
        try:
            names = names or [n.name for n in nodes if re.fullmatch(scope, n.name)]
        except re.error as error:
            raise ConfigError(f"ignored scope {scope!r} is not a regular expression: {error}") from error
        if not names:
            some = ", ".join(n.name for n in nodes if n.op_type in LAYERS)[:200]
            raise ConfigError(f"ignored scope {scope!r} matches no node of the graph", hint=f"its layers are {some} …")
        found.update(dict.fromkeys(names))
    return tuple(found)


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
        if not all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim):
            raise ModelError(f"input {value.name!r} of {path.name} has a dynamic shape", hint="freeze the shapes first")
    return model


def _pick(samples: Iterable[Feed], subset_size: int | None) -> list[Feed]:
    """``subset_size`` samples at even distances: neighbours in a set are steps of one picture."""
    everything = list(samples)
    if subset_size is None or subset_size >= len(everything):
        return everything
    return [everything[i] for i in np.linspace(0, len(everything) - 1, subset_size).round().astype(int)]


def _check_samples(model: onnx.ModelProto, samples: Sequence[Feed]) -> None:
    from onnx import helper

    if not samples:
        raise CalibrationError("the calibration set is empty", hint="capture samples of this task first")
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value.type.tensor_type for value in model.graph.input if value.name not in constants}
    for index, sample in enumerate(samples):
        if differing := sorted(set(sample) ^ set(inputs)):
            where = "the graph has no such input" if differing[0] in sample else "the sample lacks it"
            raise CalibrationError(f"calibration sample {index}: {differing[0]!r}: {where}")
        for name, kind in inputs.items():
            shape = tuple(dim.dim_value for dim in kind.shape.dim)
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            array = sample[name]
            if array.shape != shape or array.dtype != dtype:
                found = f"{array.dtype}{list(array.shape)}, not {dtype}{list(shape)}"
                raise CalibrationError(f"calibration sample {index}: {name!r} is {found}")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise CalibrationError(f"calibration sample {index}: {name!r} has NaN or Inf values")


def _run_nncf(
    model: onnx.ModelProto,
    path: Path,
    samples: Sequence[Feed],
    ignored: Sequence[str],
    settings: QuantSettings,
    progress: Callable[[int, int], None] | None,
) -> onnx.ModelProto:
    with quiet_nncf():
        import nncf
        from nncf.onnx.quantization.backend_parameters import BackendParameters
        from nncf.quantization.advanced_parameters import (
            AdvancedQuantizationParameters,
            AdvancedSmoothQuantParameters,
            OverflowFix,
        )
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        smooth = settings.smooth_quant_alpha is not None
        alpha = settings.smooth_quant_alpha if smooth else -1.0
        total = len(samples) * (2 if smooth else 1)  # SmoothQuant collects statistics of its own first
        seen = 0

        def feed(sample: Feed) -> dict[str, NDArray[Any]]:
            nonlocal seen
            seen += 1
            if progress is not None:
                progress(min(seen, total), total)
            return dict(sample)

        advanced = AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.FIRST_LAYER if settings.weight_bits_fix else OverflowFix.DISABLE,
            activations_range_estimator_params=getattr(
                RangeEstimatorParametersSet, RANGE_ESTIMATORS[settings.range_estimator]
            ),
            smooth_quant_alphas=AdvancedSmoothQuantParameters(convolution=-1, matmul=alpha),
            disable_bias_correction=not settings.fast_bias_correction,
            backend_params={BackendParameters.EXTERNAL_DATA_DIR: str(path.parent.resolve())},
        )
        # The decorator around nncf.quantize reports every call to its vendor's analytics service.
        quantize = getattr(nncf.quantize, "__wrapped__", nncf.quantize)
        try:
            with _no_arena():
                return quantize(
                    model,
                    nncf.Dataset(list(samples), feed),
                    preset=nncf.QuantizationPreset.PERFORMANCE,
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=len(samples),
                    ignored_scope=nncf.IgnoredScope(names=list(ignored)) if ignored else None,
                    advanced_parameters=advanced,
                )
        except MemoryError:
            raise
        except Exception as error:  # NNCF, ONNX and ONNX Runtime each have their own
            raise PassError(f"nncf cannot quantise {path.name}: {error}") from error


@contextmanager
def _no_arena() -> Iterator[None]:
    """Let NNCF's ONNX Runtime sessions give memory back after a run; NNCF itself has no option for that.

    Their arenas hold on to a gigabyte of a graph of Stable Diffusion 1.5's size, while others are opened.
    """
    import nncf.onnx.engine
    import onnxruntime

    def options() -> onnxruntime.SessionOptions:
        made = onnxruntime.SessionOptions()
        made.enable_cpu_mem_arena = False
        return made

    original = nncf.onnx.engine.rt
    nncf.onnx.engine.rt = SimpleNamespace(SessionOptions=options, InferenceSession=onnxruntime.InferenceSession)
    try:
        yield
    finally:
        nncf.onnx.engine.rt = original


@contextmanager
def quiet_nncf() -> Iterator[None]:
    """Keep NNCF's log and progress bars, which go to standard output, out of it."""
    logger = logging.getLogger("nncf")
    with redirect_stdout(StringIO()):
        import nncf  # noqa: F401 (its import sets the logger up)

        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _save(proto: onnx.ModelProto, out: Path) -> None:
    import onnx_ir as ir

    from mtu_compile.graph import io as graph_io

    model: ir.Model = ir.from_proto(proto)
    graph_io.check(model, "nncf")
    graph_io.save(model, out)
