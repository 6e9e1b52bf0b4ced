from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import passes
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from passes import run_passes
from passes.base import PassContext
from passes.fit_int16_sums import LIMIT, FitInt16Sums, largest_pairs
from targets.openvino.engine import OpenVINOEngine

RNG = np.random.default_rng(0)
SHAPES = {"Conv": (16, 32, 3, 3), "MatMul": (32, 16), "Gemm": (16, 32)}
LAYERS = {
    "Conv": ("[1, 32, 6, 6]", "[1, 16, 6, 6]", "Conv<pads = [1, 1, 1, 1]>", 0),
    "MatMul": ("[6, 32]", "[6, 16]", "MatMul", 1),
    "Gemm": ("[6, 32]", "[6, 16]", "Gemm<transB = 1>", 0),
}


def quantised(parse: Any, kind: str, weight: Any = None, *, zero: Any = None) -> tuple[ir.Model, Any]:
    """A quantised layer, and the float weight it was rounded from."""
    source, result, layer, axis = LAYERS[kind]
    floats = RNG.standard_normal(SHAPES[kind]) * 0.2 if weight is None else weight
    others = tuple(d for d in range(floats.ndim) if d != axis)
    scales = (np.abs(floats).max(axis=others) / 127).astype(np.float32)
    shape = [-1 if d == axis else 1 for d in range(floats.ndim)]
    integers = np.rint(floats / scales.reshape(shape)).astype(np.int8)
    model: ir.Model = parse(
        f"""agraph (float{source} x) => (float{result} y) {{
            q = QuantizeLinear(x, s, offset)
            u = DequantizeLinear(q, s, offset)
            k = DequantizeLinear<axis = {axis}>(w, sw, zeros)
            y = {layer}(u, k)
        }}""",
        s=np.float32(0.03),
        offset=np.uint8(128),
        w=integers,
        sw=scales,
        zeros=np.zeros(scales.shape, np.int8) if zero is None else zero,
    )
    next(node for node in model.graph if node.op_type == kind).name = "layer"
    return model, floats


def original(tmp_path: Path, parse: Any, kind: str, floats: Any) -> Path:
    """The float graph the layer was quantised from."""
    source, result, layer, _ = LAYERS[kind]
    graph: ir.Model = parse(
        f"agraph (float{source} x) => (float{result} y) {{ y = {layer}(x, w) }}", w=floats.astype(np.float32)
    )
    next(iter(graph.graph)).name = "layer"
    return graph_io.save(graph, tmp_path / "float.onnx")


def apply(graph: ir.Model, float_graph: Path | None = None) -> passes.PassResult:
    (result,) = run_passes(graph, [FitInt16Sums()], PassContext(original=float_graph))
    return result


def weight_of(graph: ir.Model) -> tuple[Any, Any]:
    """Integers and scales of the one weight."""
    node = next(n for n in graph.graph if n.op_type == "DequantizeLinear" and n.inputs[0].const_value is not None)
    return node.inputs[0].const_value.numpy().astype(int), node.inputs[1].const_value.numpy()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", LAYERS)
def test_no_two_products_overflow_any_more(kind: str, parse: Any, run_graph: Any, tmp_path: Path) -> None:
    graph, floats = quantised(parse, kind)
    axis, feeds = LAYERS[kind][3], {"x": RNG.standard_normal(np.array(graph.graph.inputs[0].shape)).astype(np.float32)}
    exact = run_graph(original(tmp_path, parse, kind, floats), feeds)["y"]
    before, scales = run_graph(graph, feeds)["y"], weight_of(graph)[1]
    assert largest_pairs(weight_of(graph)[0], axis).max() > LIMIT
    result = apply(graph, tmp_path / "float.onnx")
    assert (result.rewrites, result.skipped) == (1, ())
    integers, coarser = weight_of(graph)
    assert largest_pairs(integers, axis).max() <= LIMIT
    assert ((coarser >= scales) & (coarser < 2 * scales)).all()  # never as much as a whole bit
    # Rounding noise of weights alone would grow by the square of the scales' factor.
    assert sqnr_db(exact, before) - 4 < sqnr_db(exact, run_graph(graph, feeds)["y"])
    assert not apply(graph, tmp_path / "float.onnx").changed


def test_rounding_from_the_float_weight_is_more_exact_than_rounding_twice(parse: Any, tmp_path: Path) -> None:
    graph, floats = quantised(parse, "MatMul")
    twice = ir.from_proto(ir.to_proto(graph))
    apply(graph, original(tmp_path, parse, "MatMul", floats))
    apply(twice)
    errors = [np.square(w * s[None] - floats).mean() for w, s in map(weight_of, (graph, twice))]
    assert errors[0] < 0.9 * errors[1]


def test_a_float_weight_that_was_smoothed_before_it_was_quantised_is_not_taken(parse: Any, tmp_path: Path) -> None:
    graph, floats = quantised(parse, "MatMul")
    twice = ir.from_proto(ir.to_proto(graph))
    apply(graph, original(tmp_path, parse, "MatMul", floats * np.linspace(0.5, 2, 32)[:, None]))
    apply(twice)
    np.testing.assert_array_equal(weight_of(graph)[0], weight_of(twice)[0])


def test_a_channel_that_cannot_overflow_keeps_its_numbers(parse: Any) -> None:
    floats = RNG.standard_normal((32, 16)) * 0.2
    floats[::2, :8] = 0  # one weight of each pair: 127 at most
    graph, _ = quantised(parse, "MatMul", floats)
    before, scales = weight_of(graph)
    assert apply(graph).changed
    after, coarser = weight_of(graph)
    np.testing.assert_array_equal(after[:, :8], before[:, :8])
    np.testing.assert_array_equal(coarser[:8], scales[:8])
    assert (coarser[8:] > scales[8:]).sum() >= 4


def test_weights_of_either_sign_that_cancel_out_are_no_danger() -> None:
    assert largest_pairs(np.array([[127, -127, 5, 0]]).T, 1) == 127
    assert largest_pairs(np.array([[-100, -90, 5, 7]]).T, 1) == 190
    assert largest_pairs(np.array([[1, 100, 90]]).T, 1) == 101  # 90 has no neighbour


def test_a_layer_with_a_float_activation_stays(parse: Any, tmp_path: Path) -> None:
    graph, _ = quantised(parse, "MatMul")
    layer = next(node for node in graph.graph if node.op_type == "MatMul")
    layer.replace_input_with(0, graph.graph.inputs[0])
    assert not apply(graph).changed


def test_a_weight_with_a_zero_point_is_refused(parse: Any) -> None:
    graph, _ = quantised(parse, "MatMul", zero=np.full(16, 3, np.int8))
    with pytest.raises(PassError, match="has a zero point"):
        apply(graph)


@pytest.mark.int8
@pytest.mark.parametrize("kind", LAYERS)
def test_openvino_computes_it_right_on_this_cpu(kind: str, parse: Any, run_graph: Any, tmp_path: Path) -> None:
    """The largest activations there are with the largest weights: what overflows 16 bits unless it was fitted."""
    graph, _ = quantised(parse, kind, np.abs(RNG.standard_normal(SHAPES[kind])))
    feeds = {"x": np.full(np.array(graph.graph.inputs[0].shape), 3.8, np.float32)}
    apply(graph)
    exact = run_graph(graph, feeds)["y"]
    engine = OpenVINOEngine(
        graph_io.save(graph, tmp_path / "fitted.onnx"), {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32"}
    )
    assert sqnr_db(exact, engine(feeds)["y"]) > 80
