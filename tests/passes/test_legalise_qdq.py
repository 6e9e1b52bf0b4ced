from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import passes
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import op_counts
from passes import run_passes
from passes.base import PassContext
from passes.legalise_qdq import LegaliseQdq

RNG = np.random.default_rng(0)


def weight(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def apply(graph: ir.Model) -> passes.PassResult:
    (result,) = run_passes(graph, [LegaliseQdq()], PassContext())
    return result


#: Softmax(query·key + mask)·value with heads of 4; ``{q}`` and so on are Q/DQ pairs or nothing.
ATTENTION = """agraph (float[1, 8, 4] x, float[8, 8] mask) => (float[1, 8, 4] y) {{
    query = MatMul(x, wq)
    keys = MatMul(x, wk)
    value = MatMul(x, wv)
    {q}
    {k}
    key = Transpose<perm = [0, 2, 1]>(key_in)
    raw = MatMul(query_in, key)
    scaled = Mul(raw, half)
    scores = Add(scaled, mask)
    attention = Softmax(scores)
    {a}
    {v}
    y = MatMul(attention_in, value_in)
}}"""


def pair(source: str, target: str, quantised: bool) -> str:
    if not quantised:
        return f"{target} = Identity({source})"
    return f"{source}_q = QuantizeLinear({source}, scale, zero) {target} = DequantizeLinear({source}_q, scale, zero)"


def attention(parse: Any, quantised: str) -> ir.Model:
    text = ATTENTION.format(
        q=pair("query", "query_in", "q" in quantised),
        k=pair("keys", "key_in", "k" in quantised),
        a=pair("attention", "attention_in", "a" in quantised),
        v=pair("value", "value_in", "v" in quantised),
    )
    constants = {"wq": weight(4, 4), "wk": weight(4, 4), "wv": weight(4, 4), "half": np.float32(0.5)}
    model: ir.Model = parse(text, **constants, scale=np.float32(0.05), zero=np.int8(0))
    return model


@pytest.mark.parametrize("quantised", ["qk", "qkv", "av", "q", "kav"])
def test_attention_that_is_quantised_in_part_becomes_float(quantised: str, parse: Any, run_graph: Any) -> None:
    graph = attention(parse, quantised)
    feeds = {"x": weight(1, 8, 4), "mask": np.triu(np.full((8, 8), -1e4, np.float32), 1)}
    before, exact = run_graph(graph, feeds)["y"], run_graph(attention_like(graph), feeds)["y"]
    result = apply(graph)
    assert result.rewrites == len(quantised) and not result.skipped
    counts = op_counts(graph)
    assert not counts["QuantizeLinear"] and not counts["DequantizeLinear"]
    after = run_graph(graph, feeds)["y"]
    assert sqnr_db(exact, after) > 100 > sqnr_db(exact, before)
    assert not apply(graph).changed


def attention_like(graph: ir.Model) -> ir.Model:
    """The same attention, its quantisers taken out by hand."""
    copy = ir.from_proto(ir.to_proto(graph))
    for node in list(copy.graph):
        if node.op_type == "DequantizeLinear":
            source = node.inputs[0].producer().inputs[0]  # type: ignore[union-attr]
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
    return copy


@pytest.mark.parametrize("quantised", ["qkav", ""])
def test_attention_of_one_kind_stays(quantised: str, parse: Any) -> None:
    graph = attention(parse, quantised)
    before = op_counts(graph)
    result = apply(graph)
    assert not result.changed and op_counts(graph) == before


def test_a_quantiser_that_serves_another_layer_keeps_serving_it(parse: Any) -> None:
    graph = parse(
        """agraph (float[1, 8, 4] x) => (float[1, 8, 4] y, float[1, 8, 4] z) {
            q = QuantizeLinear(x, scale, zero)
            d = DequantizeLinear(q, scale, zero)
            t = Transpose<perm = [0, 2, 1]>(d)
            raw = MatMul(d, t)
            a = Softmax(raw)
            y = MatMul(a, x)
            z = MatMul(d, w)
        }""",
        w=weight(4, 4),
        scale=np.float32(0.05),
        zero=np.int8(0),
    )
    result = apply(graph)
    assert [s.node for s in result.skipped] == ["MatMul_3"]
    assert "serves other layers" in result.skipped[0].reason
    product = next(node for node in graph.graph if node.name == "MatMul_6")
    assert product.inputs[0].producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]


def test_uint8_becomes_int8_of_the_same_range(parse: Any, run_graph: Any) -> None:
    graph = parse(
        "agraph (float[4] x) => (float[4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        s=np.float32(0.01),
        z=np.uint8(0),
    )
    assert apply(graph).rewrites == 1
    feeds = {"x": np.array([0, 1.0, 2.55, 9.0], np.float32)}
    np.testing.assert_allclose(run_graph(graph, feeds)["y"], [0, 1, 2.55, 2.55], atol=0.5 * 2.55 / 127 + 1e-6)
    assert graph.graph.initializers["z"].dtype == ir.DataType.INT8
    assert not apply(graph).changed


def test_a_zero_point_left_away_is_written_down(parse: Any, run_graph: Any) -> None:
    """ONNX means uint8 where QuantizeLinear has none."""
    graph = parse(
        "agraph (float[3] x) => (float[3] y) { q = QuantizeLinear(x, s) y = DequantizeLinear(q, s) }",
        s=np.float32(0.01),
    )
    apply(graph)
    feeds = {"x": np.array([0.5, 2.5, -1.0], np.float32)}
    np.testing.assert_allclose(run_graph(graph, feeds)["y"], [0.5, 2.5, -1.0], atol=0.011)
    assert not apply(graph).changed


@pytest.mark.parametrize(("dtype", "scale"), [(np.int32, 1e-3), (np.int8, 1e-2)])
def test_a_quantised_bias_becomes_float(dtype: Any, scale: float, parse: Any, run_graph: Any) -> None:
    graph = parse(
        """agraph (float[1, 2, 4, 4] x) => (float[1, 3, 4, 4] y) {
            b = DequantizeLinear(bias, s, z)
            y = Conv<kernel_shape = [1, 1]>(x, w, b)
        }""",
        bias=np.array([100, -50, 7], dtype),
        s=np.float32(scale),
        z=np.array(0, dtype),
        w=weight(3, 2, 1, 1),
    )
    feeds = {"x": weight(1, 2, 4, 4)}
    expected = run_graph(graph, feeds)["y"]
    assert apply(graph).rewrites == 1
    assert op_counts(graph) == {"Conv": 1}
    np.testing.assert_allclose(run_graph(graph, feeds)["y"], expected, rtol=1e-6)
    assert not apply(graph).changed


@pytest.mark.parametrize(("zero", "dtype"), [(3, np.int8), (128, np.uint8)])
def test_asymmetric_quantisers_are_refused(zero: int, dtype: Any, parse: Any) -> None:
    graph = parse(
        "agraph (float[4] x) => (float[4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        s=np.float32(0.01),
        z=np.array(zero, dtype),
    )
    with pytest.raises(PassError, match="'QuantizeLinear_0' has a zero point that is not 0"):
        apply(graph)


def test_what_the_pass_promises_is_checked(parse: Any) -> None:
    graph = parse(
        "agraph (float[4] x) => (float[4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        s=np.float32(0.01),
        z=np.uint8(0),
    )
    with pytest.raises(PassError, match="'QuantizeLinear_0' is uint8, not int8 or float8e4m3fn"):
        LegaliseQdq().ensures(graph, PassContext())


def test_a_float_graph_stays(parse: Any) -> None:
    graph = parse("agraph (float[4] x) => (float[4] y) { y = Relu(x) }")
    assert not apply(graph).changed
