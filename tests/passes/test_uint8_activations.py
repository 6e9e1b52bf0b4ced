from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import passes
from mtu_compile.core.errors import ConfigError, PassError
from mtu_compile.graph import io as graph_io
from passes import run_passes
from passes.base import PassContext
from passes.registry import builtin
from passes.uint8_activations import Uint8Activations
from targets.openvino.engine import OpenVINOEngine

RNG = np.random.default_rng(0)

#: A quantised convolution whose activation is read by a float one, too; all zero points are one initialiser.
CONV = """agraph (float[1, 8, 6, 6] x) => (float[1, 8, 6, 6] y) {
    q = QuantizeLinear(x, s, zero)
    u = DequantizeLinear(q, s, zero)
    k = DequantizeLinear<axis = 0>(w, sw, zeros)
    c = Conv<pads = [1, 1, 1, 1]>(u, k)
    y = Add(c, x)
}"""


def convolution(parse: Any, zero: Any = None) -> ir.Model:
    weight = RNG.integers(-127, 128, (8, 8, 3, 3)).astype(np.int8)
    scales = RNG.uniform(0.001, 0.002, 8).astype(np.float32)
    zero = np.int8(0) if zero is None else zero
    model: ir.Model = parse(CONV, s=np.float32(0.03), zero=zero, w=weight, sw=scales, zeros=np.zeros(8, np.int8))
    return model


def apply(graph: ir.Model) -> passes.PassResult:
    (result,) = run_passes(graph, [Uint8Activations()], PassContext())
    return result


def types(graph: ir.Model, op_type: str) -> list[ir.DataType | None]:
    return [node.inputs[2].dtype for node in graph.graph if node.op_type == op_type]  # type: ignore[union-attr]


def test_activations_become_unsigned_and_compute_the_same(parse: Any, run_graph: Any) -> None:
    graph = convolution(parse)
    feeds = {"x": RNG.standard_normal((1, 8, 6, 6)).astype(np.float32) * 3}  # some are cut off at both ends
    before = run_graph(graph, feeds)["y"]
    result = apply(graph)
    assert (result.rewrites, result.skipped) == (1, ())
    assert types(graph, "QuantizeLinear") == [ir.DataType.UINT8]
    assert types(graph, "DequantizeLinear") == [ir.DataType.UINT8, ir.DataType.INT8]  # weights stay signed
    zero = next(node for node in graph.graph if node.op_type == "QuantizeLinear").inputs[2]
    assert zero is not None and zero.const_value is not None and zero.const_value.numpy() == 128
    np.testing.assert_array_equal(run_graph(graph, feeds)["y"], before)
    assert not apply(graph).changed


def test_what_is_unsigned_already_stays(parse: Any) -> None:
    assert not apply(convolution(parse, zero=np.uint8(0))).changed


def test_a_zero_point_of_its_own_is_refused(parse: Any) -> None:
    with pytest.raises(PassError, match="zero point that is not 0"):
        apply(convolution(parse, zero=np.int8(3)))


def test_integers_that_something_else_reads_stay_signed(parse: Any) -> None:
    graph: ir.Model = parse(
        """agraph (float[1, 8] x) => (float[1, 8] y, int8[1, 8] q) {
            q = QuantizeLinear(x, s, zero)
            y = DequantizeLinear(q, s, zero)
        }""",
        s=np.float32(0.03),
        zero=np.int8(0),
    )
    result = apply(graph)
    assert not result.changed
    assert [skip.reason for skip in result.skipped] == [
        "its integers are used by something else than a DequantizeLinear"
    ]


LINEAR = """agraph (float[1, 4, 8] x) => (float[1, 4, 8] y) {
    q = QuantizeLinear(x, s, zero)
    u = DequantizeLinear(q, s, zero)
    t = Reshape(u, shape)
    k = DequantizeLinear<axis = 1>(w, sw, zeros)
    y = MatMul(t, k)
}"""


def linear(parse: Any, text: str = LINEAR) -> ir.Model:
    weight = RNG.integers(-127, 128, (8, 8)).astype(np.int8)
    scales = RNG.uniform(0.001, 0.002, 8).astype(np.float32)
    constants = {"zero": np.int8(0), "zeros": np.zeros(8, np.int8), "shape": np.array([1, 4, 8])}
    model: ir.Model = parse(text, s=np.float32(0.03), w=weight, sw=scales, **constants)
    return model


def test_what_linear_layers_alone_read_stays_signed(parse: Any) -> None:
    result = apply(linear(parse))
    assert not result.changed
    (skip,) = result.skipped
    assert skip.reason.startswith("only linear layers read it")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y = MatMul(t, k)", "m = MatMul(t, k)\n y = Add(m, u)"),
        ("y = MatMul(t, k)", "p = Transpose<perm = [0, 2, 1]>(u)\n r = MatMul(p, t)\n y = MatMul(t, r)"),
    ],
    ids=["something else reads it", "its other operand is an activation"],
)
def test_what_something_else_reads_becomes_unsigned(parse: Any, old: str, new: str) -> None:
    assert apply(linear(parse, LINEAR.replace(old, new))).rewrites == 1


def test_it_comes_after_legalising() -> None:
    with pytest.raises(ConfigError, match="has to come after"):
        builtin().pipeline(("mtu::uint8-activations", "mtu::legalise-qdq"))


@pytest.mark.int8
def test_openvino_computes_the_unsigned_form_right_on_this_cpu(parse: Any, run_graph: Any, tmp_path: Path) -> None:
    """What the pass is for; weights are small, so that sums in 16 bits do not overflow anywhere."""
    graph = convolution(parse)
    weight = graph.graph.initializers["w"]
    weight.const_value = ir.tensor(weight.const_value.numpy() // 2, name="w")  # type: ignore[union-attr]
    feeds = {"x": RNG.standard_normal((1, 8, 6, 6)).astype(np.float32)}
    exact = run_graph(graph, feeds)["y"]
    apply(graph)
    path = graph_io.save(graph, tmp_path / "unsigned.onnx")
    engine = OpenVINOEngine(path, {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(engine(feeds)["y"], exact, atol=1e-4)


@pytest.mark.int8
def test_openvino_computes_a_signed_linear_layer_right_on_this_cpu(parse: Any, run_graph: Any, tmp_path: Path) -> None:
    """Why those may stay signed; weights are small, so that sums in 16 bits do not overflow anywhere."""
    graph = linear(parse)
    weight = graph.graph.initializers["w"]
    weight.const_value = ir.tensor(weight.const_value.numpy() // 2, name="w")  # type: ignore[union-attr]
    feeds = {"x": RNG.standard_normal((1, 4, 8)).astype(np.float32) * 2}
    exact = run_graph(graph, feeds)["y"]
    assert not apply(graph).changed
    path = graph_io.save(graph, tmp_path / "signed.onnx")
    engine = OpenVINOEngine(path, {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(engine(feeds)["y"], exact, atol=1e-4)
