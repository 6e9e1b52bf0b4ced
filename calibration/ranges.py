"""How large activations get in each layer: as a quantised graph allows, and as a float graph has them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibration.some_of import some_of
from mtu_compile.core.errors import CalibrationError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


#: Largest integer of a symmetric int8 quantiser.
INT8_MAX = 127.0

#: Bytes of activations one run of a graph may hand out; more layers take more runs.
OUTPUT_BYTES = 1 << 30

#: Magnitudes are counted by exponent and the first 6 bits of the mantissa of their float32: 64 bins an octave.
_SHIFT = 23 - 6
_BINS = 1 << (31 - _SHIFT)

Case = TypeVar("Case")


@dataclass(frozen=True)
class ActivationRange:
    """Magnitudes of what goes into a layer, over all calls.

    Attributes:
        absmax: the largest.
        p9999: what 99.99 % of them do not exceed, to within 1/64.
        rms: root of the mean of squares.
        int8: what a symmetric int8 quantiser has to reach for the least squared error of rounding and cutting off, as
            the range estimator ``"histogram"`` chooses it.
    """

    absmax: float
    p9999: float
    rms: float
    int8: float


def graph_ranges(int8_graph: Path) -> dict[str, float]:
    """By name of the layer, the largest magnitude its quantised input can hold; layers with a float input are absent.

    Of a product of two activations it is the larger of the two.

    Raises:
        ModelError: the graph is unreadable.
    """
    from mtu_compile.graph import io as graph_io
    from mtu_compile.graph import qdq

    ranges = {}
    for node in graph_io.load(int8_graph).graph:
        if node.op_type not in qdq.LAYERS or not all(qdq.is_dequantised(value) for value in node.inputs[:2]):
            continue
        scales = [qdq.constant(q.inputs[1]) for value in node.inputs[:2] for q in qdq.activation_quantisers(value)]
        if scales:
            ranges[node.name or ""] = INT8_MAX * max(
                float(scale.numpy().max()) for scale in scales if scale is not None
            )
    return ranges


def measure_ranges(
    graph: Path,
    inputs: Sequence[Mapping[str, NDArray[Any]]],
    *,
    ignored_scopes: Sequence[str] = (),
    output_bytes: int = OUTPUT_BYTES,
    progress: Callable[[int], None] | None = None,
) -> dict[str, ActivationRange]:
    """Run a float graph, static but perhaps for its batch, on ``inputs`` and measure what goes into its layers.

    See ``measure_cases``; all inputs are one case.
    """
    return measure_cases(
        graph, {"": inputs}, ignored_scopes=ignored_scopes, output_bytes=output_bytes, progress=progress
    )[""]


def measure_cases(
    graph: Path,
    cases: Mapping[Case, Sequence[Mapping[str, NDArray[Any]]]],
    *,
    ignored_scopes: Sequence[str] = (),
    output_bytes: int = OUTPUT_BYTES,
    progress: Callable[[int], None] | None = None,
) -> dict[Case, dict[str, ActivationRange]]:
    """Measure what goes into a float graph's layers, for each case by itself; the graph is opened once for all.

    Those layers are measured that ``calibration.quantize`` quantises: convolutions and linear layers, and of attention
    the query·key product, but not the product behind a softmax. Of a product of two activations the larger is kept.

    Args:
        graph: ONNX file, static but perhaps for its batch.
        cases: by case (a task, say) one mapping a call, an array for each input of the graph.
        ignored_scopes: layers to leave out, as in ``QuantSettings``.
        output_bytes: activations of one call that are held at once. A graph with more is run several times.
        progress: called with 1 as often as there are calls.

    Raises:
        CalibrationError: there are no inputs, or they do not fit the graph.
        ConfigError: an ignored scope matches nothing.
        ModelError: the graph is unreadable.
    """
    from calibration.quantize import resolve_scopes
    from mtu_compile.graph import io as graph_io

    calls = [(case, call) for case, inputs in cases.items() for call in inputs]
    if not calls or not all(cases.values()):
        raise CalibrationError("there are no inputs to measure activation ranges on")
    proto = graph_io.load_proto(graph)
    layers = _layer_inputs(graph, ignored=set(resolve_scopes(proto, ignored_scopes)))
    batch = max(len(array) for _, call in calls for array in call.values() if array.ndim)
    sizes = _sizes(proto, {name for names in layers.values() for name in names}, batch)
    chunks = list(_chunks(sizes, output_bytes))
    counters = {case: {name: _Counter() for name in sizes} for case in cases}
    runs = 0
    for names in chunks:
        with _session(proto, graph.parent, names) as session:
            for case, call in calls:
                try:
                    arrays = session.run(names, dict(call))
                except Exception as error:  # ONNX Runtime's own, of many kinds
                    raise CalibrationError(f"{graph.name} does not take the calibration inputs: {error}") from error
                while arrays:  # none is needed once it is counted
                    counters[case][names[len(arrays) - 1]].add(arrays.pop())
                runs += 1
                if progress is not None and runs % len(chunks) == 0:
                    progress(1)
    measured = {
        case: {name: counter.range() for name, counter in counted.items()} for case, counted in counters.items()
    }
    return {
        case: {
            layer: max((found[n] for n in names), key=lambda measure: measure.absmax) for layer, names in layers.items()
        }
        for case, found in measured.items()
    }


class _Counter:
    """Counts magnitudes without keeping them; of a large tensor some, and the largest."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS, np.int64)
        self._largest, self._squares = 0.0, 0.0

    def add(self, array: NDArray[np.float32]) -> None:
        self._largest = max(self._largest, float(array.max(initial=0.0)), -float(array.min(initial=0.0)))
        magnitudes = np.abs(np.ascontiguousarray(some_of(array), np.float32))
        self._counts += np.bincount(magnitudes.view(np.uint32) >> _SHIFT, minlength=_BINS)
        self._squares += float(np.square(magnitudes, dtype=np.float64).sum())

    def range(self) -> ActivationRange:
        total = int(self._counts.sum())
        # The upper edge of the first bin at which 99.99 % are counted.
        place = int(np.searchsorted(np.cumsum(self._counts), 0.9999 * total))
        edge = float(np.array([(place + 1) << _SHIFT], np.uint32).view(np.float32)[0])
        rms = math.sqrt(self._squares / max(total, 1))
        fitted = min(_least_error(self._counts), self._largest)
        return ActivationRange(_digits(self._largest), _digits(min(edge, self._largest)), _digits(rms), _digits(fitted))


def _least_error(counts: NDArray[np.int64]) -> float:
    """The range of a symmetric int8 quantiser with the least sum of squared errors, for magnitudes counted by bin.

    A magnitude x under a range r and its step s = r / 127 costs x² below half a step, s² / 12 on average up to r, and
    (x - r)² beyond. Ranges from the largest magnitude down to 1/16 of it are tried, 64 an octave.
    """
    filled = np.flatnonzero(counts)
    if not filled.size or filled[-1] == 0:
        return 0.0
    # Bin 0 holds the zeros; no range leaves anything of what is 16 octaves smaller than the largest.
    first, last = max(int(filled[-1]) - 64 * 16, 1), int(filled[-1])
    edges = (np.arange(first, last + 2, dtype=np.uint32) << _SHIFT).view(np.float32).astype(np.float64)
    held, middles = counts[first : last + 1].astype(np.float64), (edges[:-1] + edges[1:]) / 2
    tried = edges[-64 * 4 :]
    sums = [np.concatenate([[0.0], np.cumsum(held * middles**power)]) for power in range(3)]
    low, high = np.searchsorted(edges, tried / INT8_MAX / 2), np.searchsorted(edges, tried)
    beyond = [total[-1] - total[high] for total in sums]
    errors = sums[2][low] + (sums[0][high] - sums[0][low]) * (tried / INT8_MAX) ** 2 / 12
    errors += beyond[2] - 2 * tried * beyond[1] + tried**2 * beyond[0]
    return float(tried[int(np.argmin(errors))])


def _digits(value: float) -> float:
    """Five significant digits: more are rounding errors of the runtime."""
    return float(f"{value:.5g}")


def _layer_inputs(graph: Path, ignored: Collection[str]) -> dict[str, tuple[str, ...]]:
    """By name of the layer, the tensors that go into it and are no weights."""
    from mtu_compile.graph import io as graph_io
    from mtu_compile.graph import qdq

    tensors = {}
    for node in graph_io.load(graph).graph:
        if node.op_type not in qdq.LAYERS or node.name in ignored:
            continue
        places = node.inputs[:2] if node.op_type == "MatMul" else node.inputs[:1]
        values = [value for value in places if value is not None and not _is_weight(value)]
        if values and not any(_behind_softmax(value) for value in values):
            tensors[node.name or ""] = tuple(value.name or "" for value in values)
    return tensors


def _is_weight(value: ir.Value) -> bool:
    from mtu_compile.graph import qdq

    node = value.producer()
    if node is None:
        return qdq.constant(value) is not None
    return node.op_type in qdq.TRANSPARENT and all(_is_weight(read) for read in node.inputs if read is not None)


def _behind_softmax(value: ir.Value) -> bool:
    from mtu_compile.graph import qdq

    node = value.producer()
    if node is None or node.op_type == "Softmax":
        return node is not None
    source = node.inputs[0] if node.op_type in qdq.TRANSPARENT else None
    return source is not None and _behind_softmax(source)


def _sizes(proto: onnx.ModelProto, names: Collection[str], batch: int) -> dict[str, int]:
    """Bytes of tensors, in graph order; 0 where the shape is not known. What is dynamic counts as ``batch``."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(proto)
    sizes = dict.fromkeys(sorted(names), 0)
    for value in (*inferred.graph.value_info, *inferred.graph.input):
        if value.name in sizes:
            dims = value.type.tensor_type.shape.dim
            sizes[value.name] = 4 * math.prod(dim.dim_value or _times(dim.dim_param) * batch for dim in dims)
    return sizes


def _times(dimension: str) -> int:
    """How many times the batch a dynamic dimension is (``"4*batch"``)."""
    factor = dimension.rpartition("*")[0]
    return int(factor) if factor.isdigit() else 1


def _chunks(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """Names in as few groups as their order allows, each of at most ``limit`` bytes or of a single name."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group


@contextmanager
def _session(proto: onnx.ModelProto, folder: Path, names: Sequence[str]) -> Iterator[Any]:
    """An ONNX Runtime session that hands out ``names``; weights in external data are looked for in ``folder``."""
    import onnx
    import onnxruntime

    from mtu_compile.graph import io as graph_io
    from mtu_compile.graph.sessions import lean_options

    wider = onnx.ModelProto()
    wider.CopyFrom(proto)
    del wider.graph.output[:]
    for name in names:
        wider.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = lean_options(in_files=bool(graph_io.weight_files(proto)))
    # Beside the weights: external data is found relative to the model's file.
    path = folder / f".ranges-{secrets.token_hex(4)}.onnx"
    try:
        path.write_bytes(wider.SerializeToString())
        yield onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    finally:
        path.unlink(missing_ok=True)
