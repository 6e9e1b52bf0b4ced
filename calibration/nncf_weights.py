"""NNCF and the weights of large graphs: they stay in their files, and one at a time is looked at.

By itself NNCF 3.4 has ONNX Runtime hand out every weight at every calibration sample, and at the end reads all float
weights into one protobuf, which may not have more than 2 GiB, before it makes integers of them. Of activations it
counts every number, which a large network takes a minute for (``some_of``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration.some_of import some_of
from mtu_compile.core.errors import PassError
from mtu_compile.graph import qdq
from mtu_compile.graph.sessions import lean_options

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


@contextmanager
def weights_in_files(model: onnx.ModelProto) -> Iterator[None]:
    """Within the block, ``nncf.quantize(model, …)`` is modest; NNCF itself has no options for that.

    It has to be told not to compress weights (``BackendParameters.COMPRESS_WEIGHTS``): ``fold_weights`` does.
    """
    import nncf.onnx.engine
    import nncf.onnx.graph.onnx_helper as helper
    import nncf.onnx.quantization.quantize_model as last
    import nncf.onnx.statistics.aggregator as statistics
    import onnxruntime
    from nncf.common.tensor_statistics.collectors import HistogramAggregator

    from mtu_compile.graph import io as graph_io

    in_files = bool(graph_io.weight_files(model))
    sessions = SimpleNamespace(
        SessionOptions=lambda: lean_options(in_files=in_files), InferenceSession=onnxruntime.InferenceSession
    )
    patches: list[tuple[Any, str, Any]] = [
        (nncf.onnx.engine, "rt", sessions),
        (last, "load_external_data_for_model", lambda model, folder: None),
        (helper, "get_array_from_tensor", _read),
        (HistogramAggregator, "_register_reduced_input_impl", _of_some(HistogramAggregator)),
        (statistics, "ONNXStatisticsAggregator", _one_weight_at_a_time(statistics.ONNXStatisticsAggregator)),
    ]
    originals = [(module, name, getattr(module, name)) for module, name, _ in patches]
    for module, name, replacement in patches:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _of_some(histograms: Any) -> Any:
    """What adds a tensor to a histogram, by some numbers of it where it is large."""
    from nncf.tensor import Tensor

    add = histograms._register_reduced_input_impl

    def add_some(self: Any, x: Any) -> None:
        few = some_of(x.data)
        if few.size == x.data.size:
            add(self, x)
            return
        lows, highs = [float(x.data.min())], [float(x.data.max())]
        if self.min_val is not None:
            lows.append(self.min_val)
            highs.append(self.max_val)
        low, high = min(lows), max(highs)
        counted = Tensor(np.histogram(few, self.bins, range=(low, high))[0])
        if self.min_val is not None:
            counted = self._combine_histograms(self.histogram, self.min_val, self.max_val, counted, low, high)
        self.histogram, self.min_val, self.max_val = counted, low, high

    return add_some


def _read(model: onnx.ModelProto, tensor: onnx.TensorProto) -> NDArray[Any]:
    """``tensor``, from its file if it is in one. ONNX's own reader would leave all of it in the graph as well."""
    import onnx
    from nncf.onnx.graph.model_metadata import MetadataKey, get_metadata

    alone = onnx.TensorProto()
    alone.CopyFrom(tensor)
    values: NDArray[Any] = onnx.numpy_helper.to_array(alone, get_metadata(model, MetadataKey.EXTERNAL_DATA_DIR) or "")
    return values


def _one_weight_at_a_time(base: Any) -> Any:
    """NNCF's collector of statistics, which reads weights from where they are instead of from the graph's outputs."""
    from nncf.common.graph.transformations.commands import TargetType
    from nncf.common.tensor_statistics.statistic_point import StatisticPointsContainer
    from nncf.onnx.graph.onnx_helper import get_tensor_value
    from nncf.tensor import Tensor

    class OneWeightAtATime(base):  # type: ignore[misc]
        def collect_statistics(self, model: onnx.ModelProto, graph: Any) -> None:
            self._constants = {tensor.name for tensor in model.graph.initializer}
            super().collect_statistics(model, graph)
            for node, points in self.statistic_points.items():
                for point in points:
                    if (name := self._weight(point)) is not None:
                        alone = StatisticPointsContainer()
                        alone[node] = [point]
                        super()._register_statistics({name: Tensor(get_tensor_value(model, name))}, alone)

        def _get_transformation_layout_extra_outputs(self, statistic_points: Any) -> Any:
            return super()._get_transformation_layout_extra_outputs(self._of_activations(statistic_points))

        def _register_statistics(self, outputs: Any, statistic_points: Any) -> None:
            super()._register_statistics(outputs, self._of_activations(statistic_points))

        def _of_activations(self, statistic_points: Any) -> Any:
            found = StatisticPointsContainer()
            for node, points in statistic_points.items():
                found[node] = [point for point in points if self._weight(point) is None]
            return found

        def _weight(self, point: Any) -> str | None:
            """Name of the constant that the point is at."""
            target = point.target_point
            if target.type != TargetType.OPERATION_WITH_WEIGHTS:
                return None
            name = str(self.node_mapping[target.target_node_name].input[target.port_id])
            return name if name in self._constants else None

    return OneWeightAtATime


def fold_weights(model: ir.Model) -> int:
    """Store weights behind a QuantizeLinear as the integers it would make of them, in place; returns how many.

    Given:   w (float) → QuantizeLinear → DequantizeLinear → layer
    Result:  w8 → DequantizeLinear → layer

    The integers are computed when the graph is written, one weight after the other.

    Raises:
        PassError: a weight's scale is not constant.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    folded = 0
    for node in list(model.graph):
        weight = qdq.constant(node.inputs[0]) if node.op_type == "QuantizeLinear" else None
        if weight is None:
            continue
        scale, zero = qdq.constant(node.inputs[1]), qdq.constant(qdq.zero_point(node))
        if scale is None or zero is None:
            raise PassError(f"quantiser {node.name!r} of a weight has no constant scale and zero point")
        axis = int(node.attributes["axis"].value) if "axis" in node.attributes else 1
        old, weight_shape = node.outputs[0], ir.Shape(weight.shape.numpy())
        tensor = ir.LazyTensor(_maker(weight, scale, zero, axis), dtype=zero.dtype, shape=weight_shape)
        tensor.name = old.name
        ir.convenience.replace_all_uses_with(old, made := ir.Value(type=ir.TensorType(zero.dtype), const_value=tensor))
        model.graph.remove(node, safe=True)
        made.name, made.shape = tensor.name, tensor.shape
        model.graph.register_initializer(made)
        folded += 1
    RemoveUnusedNodesPass()(model)
    return folded


def _maker(weight: ir.TensorProtocol, scale: ir.TensorProtocol, zero: ir.TensorProtocol, axis: int) -> Any:
    def make() -> ir.TensorProtocol:
        import onnx_ir as ir

        made = quantize_linear(weight.numpy(), scale.numpy(), zero.numpy(), axis)
        if isinstance(weight, ir.ExternalTensor):
            weight.release()
        return ir.tensor(made)

    return make


def quantize_linear(
    values: NDArray[Any], scale: NDArray[np.float32], zero: NDArray[Any], axis: int
) -> NDArray[np.integer[Any]]:
    """What ONNX's QuantizeLinear makes of ``values``: rounded to even, and cut off at the ends of ``zero``'s type.

    Args:
        values: float32.
        scale, zero: numbers, or vectors along ``axis``.
    """
    ends = np.iinfo(zero.dtype)
    if scale.ndim:
        shape = [-1 if place == axis % values.ndim else 1 for place in range(values.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    rounded = np.rint(values / scale)
    rounded += zero
    return np.clip(rounded, ends.min, ends.max, out=rounded).astype(zero.dtype)
