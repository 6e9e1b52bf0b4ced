from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import passes
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import op_counts
from passes import run_passes
from passes.base import PassContext
from passes.keep_float import KEEP, last_layer
from passes.simulate_half import simulate_half
from passes.to_half import ToHalf, to_bf16, to_fp16

FLOAT, FP16, BF16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
RNG = np.random.default_rng(0)


def weight(*shape: int, scale: float = 1.0) -> Any:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def apply(graph: ir.Model, item: ToHalf | None = None) -> passes.PassResult:
    (result,) = run_passes(graph, [item or to_fp16()], PassContext())
    return result


def types(graph: ir.Model) -> dict[str, ir.DataType | None]:
    """Type of what each node makes."""
    return {node.name or "": node.outputs[0].dtype for node in graph.graph}


@pytest.fixture
def block(parse: Any) -> ir.Model:
    """Two layers with a norm and a sigmoid between them: x [1, 4, 8, 8] → y [1, 4, 8, 8]."""
    graph: ir.Model = parse(
        """agraph (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
            a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, first)
            m = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(a, middle, bias)
            n = InstanceNormalization(m, ones, zeros)
            s = Sigmoid(n)
            p = Mul(n, s)
            y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(p, last)
        }""",
        first=weight(8, 4, 3, 3, scale=0.2),
        middle=weight(8, 8, 3, 3, scale=0.2),
        bias=weight(8),
        ones=np.ones(8, np.float32),
        zeros=np.zeros(8, np.float32),
        last=weight(4, 8, 3, 3, scale=0.2),
    )
    return graph


def test_all_but_the_ends_become_half(block: ir.Model, run_graph: Any) -> None:
    feeds = {"x": weight(1, 4, 8, 8)}
    expected = run_graph(block, feeds)["y"]
    result = apply(block)
    assert result.rewrites == 4  # middle layer, norm, sigmoid, product
    found = types(block)
    assert [found[name] for name in ("Conv_0", "Conv_5")] == [FLOAT, FLOAT]
    assert [found[name] for name in ("Conv_1", "InstanceNormalization_2", "Sigmoid_3", "Mul_4")] == [FP16] * 4
    assert op_counts(block)["Cast"] == 2
    assert [v.dtype for v in (*block.graph.inputs, *block.graph.outputs)] == [FLOAT, FLOAT]
    weights = {name: value.dtype for name, value in block.graph.initializers.items()}
    assert weights == {n: FLOAT if n in ("first", "last") else FP16 for n in weights} and len(weights) == 6
    assert 45 < sqnr_db(expected, run_graph(block, feeds)["y"]) < 199
    assert not apply(block).changed


def test_a_graph_of_nothing_to_keep_casts_at_its_border_only(block: ir.Model, run_graph: Any) -> None:
    feeds = {"x": weight(1, 4, 8, 8)}
    expected = run_graph(block, feeds)["y"]
    item = ToHalf("test::all", FP16, {})
    assert apply(block, item).rewrites == 6
    assert op_counts(block)["Cast"] == 2
    assert [v.name for v in (*block.graph.inputs, *block.graph.outputs)] == ["x", "y"]
    assert sqnr_db(expected, run_graph(block, feeds)["y"]) > 45
    assert not apply(block, item).changed


def test_bfloat16_raises_the_opset_its_convolutions_need(block: ir.Model) -> None:
    assert apply(block, to_bf16()).rewrites == 4
    assert block.opset_imports[""] == 22
    assert types(block)["Conv_1"] == BF16
    onnx.checker.check_model(ir.to_proto(block), full_check=True)
    assert not apply(block, to_bf16()).changed


def test_angles_stay(parse: Any, run_graph: Any) -> None:
    def graph() -> ir.Model:
        model: ir.Model = parse(
            """agraph (float[1] timestep) => (float[1, 4] y) {
                t = Unsqueeze(timestep, axis)
                angle = Mul(t, frequencies)
                s = Sin(angle)
                c = Cos(angle)
                e = Concat<axis = -1>(s, c)
                h = MatMul(e, w)
                y = Sigmoid(h)
            }""",
            axis=np.array([0], np.int64),
            frequencies=np.array([[1.0, 0.37]], np.float32),
            w=weight(4, 4),
        )
        return model

    feeds = {"timestep": np.array([999.0], np.float32)}
    kept, lost = graph(), graph()
    expected = run_graph(kept, feeds)["y"]
    apply(kept)
    apply(lost, ToHalf("test::all", FP16, {}))
    assert types(kept)["Mul_1"] == types(kept)["Sin_2"] == FLOAT
    assert types(kept)["Concat_4"] == types(kept)["MatMul_5"] == FP16
    assert sqnr_db(expected, run_graph(kept, feeds)["y"]) > 50
    assert sqnr_db(expected, run_graph(lost, feeds)["y"]) < 45


def test_powers_and_sums_stay_because_fp16_overflows(parse: Any, run_graph: Any) -> None:
    text = """agraph (float[1, 8] x) => (float[1, 8] y) {
        q = Mul(x, ones)
        p = Pow(q, two)
        m = ReduceMean<keepdims = 1>(p, axes)
        r = Sqrt(m)
        y = Div(q, r)
    }"""
    constants = {"ones": np.ones(8, np.float32), "two": np.float32(2), "axes": np.array([1], np.int64)}
    feeds = {"x": np.array([[300.0, -400, 500, 600, -700, 800, 900, 1000]], np.float32)}
    kept = parse(text, **constants)
    expected = run_graph(kept, feeds)["y"]
    apply(kept)
    assert types(kept)["Pow_1"] == FLOAT
    half = parse(text, **constants)
    apply(half, ToHalf("test::all", FP16, {}))
    simulate_half(half)
    assert not run_graph(half, feeds)["y"].any()  # divided by infinity
    simulate_half(kept)
    assert sqnr_db(expected, run_graph(kept, feeds)["y"]) > 45


def test_numbers_that_are_moved_between_float_nodes_are_not_rounded(parse: Any) -> None:
    graph = parse(
        """agraph (float[1, 4] x) => (float[1, 4] y, float[2, 2] z) {
            a = Exp(x)
            t = Reshape(a, shape)
            u = Transpose<perm = [1, 0]>(t)
            b = Exp(u)
            v = Reshape(b, flat)
            y = Sigmoid(v)
            z = Relu(u)
        }""",
        shape=np.array([2, 2], np.int64),
        flat=np.array([1, 4], np.int64),
    )
    apply(graph)
    found = types(graph)
    assert found["Reshape_1"] == found["Transpose_2"] == FLOAT  # between two Exp
    assert found["Reshape_4"] == FP16  # only Sigmoid reads it: half the bytes are moved
    assert op_counts(graph)["Cast"] == 4  # u and b to half, y and z back


def test_one_cast_serves_all_readers(parse: Any) -> None:
    graph = parse(
        """agraph (float[4] x) => (float[4] y) {
            a = Exp(x) b = Sigmoid(a) c = Tanh(a) d = Relu(a) e = Add(b, c) f = Add(d, e) y = Exp(f)
        }"""
    )
    apply(graph)
    assert op_counts(graph)["Cast"] == 2


def test_a_node_whose_constant_is_out_of_range_stays(parse: Any, run_graph: Any) -> None:
    graph = parse(
        "agraph (float[4] x) => (float[4] y) { a = Relu(x) b = Mul(a, big) c = Mul(b, small) y = Sigmoid(c) }",
        big=np.full(4, 1e6, np.float32),
        small=np.full(4, 1e-3, np.float32),
    )
    feeds = {"x": np.array([0.001, 0.002, -1, 0.5], np.float32)}
    expected = run_graph(graph, feeds)["y"]
    result = apply(graph)
    assert [(s.node, s.reason) for s in result.skipped] == [("Mul_1", "'big' has numbers above fp16's range")]
    assert types(graph)["Mul_1"] == FLOAT and types(graph)["Relu_0"] == FP16
    assert graph.graph.initializers["big"].dtype == FLOAT
    assert np.isfinite(run_graph(graph, feeds)["y"]).all()
    assert sqnr_db(expected, run_graph(graph, feeds)["y"]) > 40
    assert not apply(graph).changed


def test_numbers_that_vanish_are_counted(parse: Any) -> None:
    graph = parse(
        "agraph (float[4] x) => (float[4] y) { a = Mul(x, w) y = Sigmoid(a) }",
        w=np.array([1.0, 1e-9, 0.0, -1e-8], np.float32),
    )
    result = apply(graph)
    assert [s.reason for s in result.skipped] == ["2 of 4 numbers are too small for fp16 and become 0"]
    assert not apply(parse("agraph (float[4] x) => (float[4] y) { y = Sigmoid(x) }")).skipped


@pytest.mark.parametrize("make", [to_fp16, to_bf16])
def test_a_mask_of_the_lowest_float_stays_finite(make: Any, parse: Any) -> None:
    graph = parse(
        "agraph (float[2] x, bool[2] keep) => (float[2] y) { m = Where(keep, zero, lowest) a = Add(x, m) y = Relu(a) }",
        zero=np.float32(0),
        lowest=np.float32(np.finfo(np.float32).min),
    )
    result = apply(graph, make())
    assert not result.skipped
    value = graph.graph.initializers["lowest"].const_value.numpy().astype(np.float32)
    assert np.isfinite(value) and value < -6e4


def test_infinity_stays_infinite(parse: Any) -> None:
    graph = parse(
        "agraph (float[2] x, bool[2] keep) => (float[2] y) { m = Where(keep, x, low) y = Relu(m) }",
        low=np.float32(-np.inf),
    )
    assert not apply(graph).skipped
    assert graph.graph.initializers["low"].const_value.numpy() == -np.inf


def test_a_small_constant_of_both_kinds_is_stored_twice_and_a_large_one_once(parse: Any, run_graph: Any) -> None:
    def graph(size: int) -> ir.Model:
        model: ir.Model = parse(
            f"""agraph (float[{size}] x) => (float[{size}] y) {{
                a = Exp(w) b = Mul(x, w) c = Add(a, b) y = Sigmoid(c)
            }}""",
            w=weight(size, scale=0.1),
        )
        return model

    small, large = graph(8), graph(5000)
    for model in (small, large):
        feeds = {"x": weight(model.graph.inputs[0].shape[0])}  # type: ignore[index]
        expected = run_graph(model, feeds)["y"]
        apply(model)
        assert sqnr_db(expected, run_graph(model, feeds)["y"]) > 50
    assert {n: v.dtype for n, v in small.graph.initializers.items()} == {"w": FLOAT, "w.fp16": FP16}
    assert {n: v.dtype for n, v in large.graph.initializers.items()} == {"w": FLOAT}


def test_integers_and_what_is_made_of_them_stay(parse: Any, run_graph: Any) -> None:
    graph = parse(
        """agraph (int64[1, 3] input_ids) => (float[1, 3, 4] y, int64[1] last) {
            e = Gather<axis = 0>(table, input_ids)
            f = Cast<to = 1>(input_ids)
            g = Unsqueeze(f, axis)
            h = Mul(e, g)
            y = Sigmoid(h)
            last = ArgMax<axis = 1, keepdims = 0>(input_ids)
        }""",
        table=weight(7, 4),
        axis=np.array([2], np.int64),
    )
    feeds = {"input_ids": np.array([[3, 6, 1]], np.int64)}
    expected = run_graph(graph, feeds)
    apply(graph)
    assert graph.graph.inputs[0].dtype == ir.DataType.INT64
    assert op_counts(graph)["Cast"] == 2  # the one that was there makes half itself
    found = run_graph(graph, feeds)
    assert found["last"] == expected["last"]
    assert sqnr_db(expected["y"], found["y"]) > 45


QUANTISED = """agraph (float[2, 8] x) => (float[2, 8] y) {
    a = Relu(x)
    q = QuantizeLinear(a, s, z)
    d = DequantizeLinear(q, s, z)
    k = DequantizeLinear<axis = 1>(w, ws, wz)
    m = MatMul(d, k)
    n = Mul(m, gain)
    y = Sigmoid(n)
}"""


def quantised(parse: Any, text: str = QUANTISED, *, scale: float = 0.02, weight_scale: float = 0.01) -> ir.Model:
    spread = np.geomspace(1, 0.1, 8)
    model: ir.Model = parse(
        text,
        s=np.float32(scale),
        z=np.int8(0),
        w=RNG.integers(-127, 128, (8, 8), np.int8),
        ws=(weight_scale * spread).astype(np.float32),
        wz=np.zeros(8, np.int8),
        gain=np.float32(0.01 / weight_scale),
    )
    return model


def test_scales_become_half_and_integers_stay(parse: Any, run_graph: Any) -> None:
    graph = quantised(parse)
    integers = graph.graph.initializers["w"].const_value.numpy().copy()
    feeds = {"x": np.abs(weight(2, 8))}
    expected = run_graph(graph, feeds)["y"]
    assert apply(graph).rewrites == 7
    assert [graph.graph.initializers[name].dtype for name in ("s", "ws")] == [FP16, FP16]
    np.testing.assert_array_equal(graph.graph.initializers["w"].const_value.numpy(), integers)
    assert op_counts(graph)["Cast"] == 2
    assert sqnr_db(expected, run_graph(graph, feeds)["y"]) > 40
    assert not apply(graph).changed


@pytest.mark.parametrize("weight_scale", [1e-5, 1e-6, 1e-7])
def test_scales_below_fp16_take_their_integers_along(weight_scale: float, parse: Any) -> None:
    """A weight of such a scale is as exact as int8 and fp16's own steps allow."""
    graph = quantised(parse, weight_scale=weight_scale)
    w, ws = (graph.graph.initializers[name].const_value.numpy().astype(np.float64) for name in ("w", "ws"))
    apply(graph)
    w_new, ws_new = (graph.graph.initializers[name].const_value.numpy().astype(np.float64) for name in ("w", "ws"))
    assert (ws_new > 0).all()
    error = np.abs(w_new * ws_new - w * ws)
    naive = np.abs(w * ws.astype(np.float16) - w * ws)
    # Half a step of the new scale where the integers were rescaled, 2⁻⁸ of the weight where the scale was only rounded.
    assert (error <= np.maximum(0.5 * ws_new, 2.0**-8 * np.abs(w * ws)) * 1.001).all()
    assert error.max() <= naive.max()
    assert weight_scale > 1e-6 or error.max() < 0.5 * naive.max()


def test_the_scale_of_a_tiny_activation_stays_a_number_one_can_divide_by(parse: Any) -> None:
    graph = quantised(parse, scale=1e-6)
    apply(graph)
    scale = graph.graph.initializers["s"].const_value.numpy()
    assert np.isfinite(np.float16(1) / scale)


def test_a_quantiser_takes_float_as_it_is_and_both_its_sides_agree(parse: Any) -> None:
    graph = quantised(parse, QUANTISED.replace("Relu(x)", "Exp(x)"))
    apply(graph)
    quantiser = next(node for node in graph.graph if node.op_type == "QuantizeLinear")
    dequantiser = quantiser.outputs[0].consumers()[0]
    assert quantiser.inputs[0].dtype == quantiser.inputs[1].dtype == FLOAT
    assert dequantiser.inputs[1].dtype == FP16
    one, other = (node.inputs[1].const_value.numpy().astype(np.float64) for node in (quantiser, dequantiser))
    assert one == other


def test_a_dequantiser_before_float_nodes_stays_float(parse: Any) -> None:
    graph = quantised(parse, QUANTISED.replace("Sigmoid(n)", "Exp(n)").replace("Mul(m, gain)", "Exp(m)"))
    apply(
        graph, ToHalf("test::last", FP16, {**KEEP, "products": lambda g: {n for n in g.graph if n.name == "MatMul_4"}})
    )
    assert types(graph)["DequantizeLinear_2"] == types(graph)["DequantizeLinear_3"] == FLOAT
    assert graph.graph.initializers["ws"].dtype == FLOAT


def test_a_node_with_its_own_graph_is_refused(parse: Any) -> None:
    graph = parse(
        """agraph (float[2] x, bool c) => (float[2] y) {
            y = If(c) <
                then_branch = t () => (float[2] a) { a = Relu(x) },
                else_branch = e () => (float[2] b) { b = Exp(x) }
            >
        }"""
    )
    with pytest.raises(PassError, match="'If_0' is a If: it has a graph of its own"):
        apply(graph)


def test_an_operator_that_changed_its_meaning_is_refused_in_bf16(parse: Any) -> None:
    graph = parse(
        "agraph (float[1, 4, 8] x) => (float[1, 4, 8] y) { y = GroupNormalization<num_groups = 2>(x, one, zero) }",
        one=np.ones(2, np.float32),
        zero=np.zeros(2, np.float32),
    )
    with pytest.raises(PassError, match="'GroupNormalization_0' means something else in opset 22"):
        apply(graph, to_bf16())


def test_the_last_layer_is_found_behind_what_follows_it(parse: Any) -> None:
    graph = parse(
        """agraph (float[2, 4] x) => (float[4, 2] y) {
            a = MatMul(x, v) r = Relu(a) b = MatMul(r, w) c = Add(b, bias) y = Transpose<perm = [1, 0]>(c)
        }""",
        v=weight(4, 4),
        w=weight(4, 4),
        bias=weight(4),
    )
    assert {node.name for node in last_layer(graph)} == {"MatMul_2", "Add_3", "Transpose_4"}


@pytest.fixture(scope="module")
def static_unet(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained UNet, static: every operator a UNet has."""
    path: Path = tmp_path_factory.mktemp("half") / "static.onnx"
    context = PassContext(batch=2, height=8, width=8, text_length=5)
    passes.run_pipeline(exported("plain-micro"), path, passes.STATIC_PIPELINE, context)
    return path


def test_a_unet_in_fp16(static_unet: Path, tmp_path: Path, run_graph: Any, random_feeds: Any) -> None:
    out = tmp_path / "fp16.onnx"
    (result,) = passes.run_pipeline(static_unet, out, ["mtu::to-fp16"], PassContext(), external_bytes=0)
    assert result.changed
    feeds = random_feeds(static_unet, 2, 4, 8, 8)
    expected = run_graph(static_unet, feeds)
    found = run_graph(out, feeds)
    assert all(array.dtype == np.float32 for array in found.values())
    assert sqnr_db(*(next(iter(side.values())) for side in (expected, found))) > 50
    # All but the ends is stored in half: no weight is there twice.
    before, after = (graph_io.weight_bytes(graph_io.load(path)) for path in (static_unet, out))
    assert after < 0.6 * before
    assert op_counts(graph_io.load(out))["Cast"] <= 6


def test_weights_in_files_are_read_one_at_a_time(static_unet: Path, tmp_path: Path) -> None:
    """Nothing of external weights stays in memory between the pass and the writing."""
    external = tmp_path / "external.onnx"
    graph_io.save(graph_io.load(static_unet), external, external_bytes=0)
    graph = graph_io.load(external)
    apply(graph)
    large = [v.const_value for v in graph.graph.initializers.values() if v.const_value.nbytes > graph_io.INLINE_BYTES]
    assert large and all(isinstance(tensor, (ir.LazyTensor, ir.ExternalTensor)) for tensor in large)
    assert not any(getattr(tensor, "cache", False) for tensor in large)


@pytest.mark.parametrize("half", ["mtu::to-fp16", "mtu::to-bf16"])
def test_tensorrt_rtx_builds_a_half_unet(half: str, static_unet: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from targets.nvidia.builder import Recipe, build_engine

    passes.run_pipeline(static_unet, tmp_path / "half.onnx", [half], PassContext())
    recipe = Recipe(compute_capabilities=("8.9",))
    built = build_engine(tmp_path / "half.onnx", tmp_path / "half.engine", recipe, kind="tensorrt-rtx")
    assert built.bytes > 0
