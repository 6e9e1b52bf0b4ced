from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtu_compile.core.errors import ModelError
from mtu_compile.graph import io as graph_io
from targets.costs.estimate import Footprint, footprint


@pytest.fixture
def parse() -> Any:
    """``parse(text, weight=array, …)``: a graph in ONNX's textual syntax, with initialisers."""
    import onnx
    import onnx_ir as ir

    def build(text: str, **weights: Any) -> Any:
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]>\ng {text}')
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
        return ir.from_proto(proto)

    return build


def read(path: Path, precision: Any, rest: Any = "fp16") -> Footprint:
    return footprint(graph_io.load(path), precision=precision, rest=rest)


def floats(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def test_weights_and_peak_are_those_of_the_graph(unet_like: Path) -> None:
    numbers = 16 + 32 * 8 + 8 * 4 * 9 + 8 + 4 * 8
    integers = 4  # batch, axis and the two axes, int64
    plan = read(unet_like, "fp32")
    assert plan.weights_bytes == 4 * numbers + 8 * integers
    # The first convolution holds its input, its output and time [2, 8] at once; the Add writes over the output.
    assert plan.activation_bytes == 4 * (2 * 4 * 64 + 2 * 8 * 64 + 16)
    assert plan.unknown_shapes == 0
    half = read(unet_like, "bf16")
    assert half.weights_bytes == 2 * numbers + 8 * integers
    assert half.activation_bytes == plan.activation_bytes // 2


def test_a_float_graph_planned_as_int8_has_bytes_for_weights_and_a_scale_a_channel(unet_like: Path) -> None:
    layers = 32 * 8 + 8 * 4 * 9 + 4 * 8  # one MatMul, two Conv
    channels = 8 + 8 + 4
    others = 16 + 8  # frequencies and a bias
    for rest, width in (("fp16", 2), ("fp32", 4)):
        plan = read(unet_like, "int8", rest)
        assert plan.weights_bytes == layers + width * (channels + others) + 8 * 4, rest


def test_a_weight_that_is_read_as_a_number_stays_a_float(parse: Any) -> None:
    alone = parse("(float[8,8] x) => (float[8,8] y) { y = MatMul(x, w) }", w=floats(8, 8))
    shared = parse("(float[8,8] x) => (float[8,8] y) { h = MatMul(x, w) y = Add(h, w) }", w=floats(8, 8))
    assert footprint(alone, precision="int8").weights_bytes == 64 + 2 * 8
    assert footprint(shared, precision="int8").weights_bytes == 2 * 64


def test_a_quantised_graph_is_counted_as_it_is(parse: Any) -> None:
    model = parse(
        "(float[1,100] x) => (float[1,100] y) { w = DequantizeLinear(w8, s) y = MatMul(x, w) }",
        w8=np.zeros((100, 100), np.int8),
        s=np.array(1, np.float32),
    )
    found = footprint(model, precision="int8")
    assert found.weights_bytes == 10_000 + 2
    # The dequantised weight is no activation: no engine keeps it.
    assert found.activation_bytes == 2 * (100 + 100)


def test_what_only_quantised_layers_read_is_one_byte(parse: Any) -> None:
    text = "(float[1,64] x) => (float[1,8] y) { a = Relu(x) y = MatMul(a, w) }"
    model = parse(text, w=floats(64, 8))
    # x (two bytes) and its one-byte copy; without the plan to quantise, Relu writes over nothing but a graph input.
    assert footprint(model, precision="fp16").activation_bytes == 2 * (64 + 64)
    assert footprint(model, precision="int8").activation_bytes == 2 * 64 + 64
    residual = parse(
        "(float[1,64] x) => (float[1,64] y) { a = Relu(x) h = MatMul(a, w) y = Add(a, h) }", w=floats(64, 64)
    )
    assert footprint(residual, precision="int8").activation_bytes == 2 * (64 + 64)


def test_what_is_still_read_is_not_written_over(parse: Any) -> None:
    chain = parse("(float[64] x) => (float[64] y) { a = Exp(x) b = Neg(a) c = Sqrt(b) y = Sigmoid(c) }")
    assert footprint(chain, precision="fp32").activation_bytes == 4 * 2 * 64  # the input's buffer is the caller's
    branches = "a = Exp(x) b = Neg(a) c = Sqrt(a) d = Sigmoid(b) e = Add(c, d) y = Add(e, a)"
    kept = parse(f"(float[64] x) => (float[64] y) {{ {branches} }}")
    assert footprint(kept, precision="fp32").activation_bytes == 4 * 3 * 64  # a, b and c


def test_views_take_nothing_and_keep_their_source_alive(parse: Any) -> None:
    text = """(float[64] x) => (float[8,8] y) {
        a = Exp(x) v = Reshape(a, s) b = Neg(a) d = Sqrt(b) e = Add(b, d) f = Reshape(e, s) y = Add(v, f)
    }"""
    model = parse(text, s=np.array([8, 8], np.int64))
    # a lives on in its view v, so b has a buffer of its own, and d a third one.
    assert footprint(model, precision="fp32").activation_bytes == 4 * 3 * 64


def test_attention_is_fused_and_its_scores_are_told(parse: Any) -> None:
    model = parse(
        """(float[1,128,16] q, float[1,16,128] k, float[1,128,16] v) => (float[1,128,16] y) {
            s = MatMul(q, k)  t = Mul(s, c)  p = Softmax <axis = -1> (t)  y = MatMul(p, v)
        }""",
        c=np.array(0.25, np.float32),
    )
    found = footprint(model, precision="fp32")
    one, scores = 128 * 16, 128 * 128
    assert found.activation_bytes == 4 * 4 * one  # a fused attention reads q, k and v until y is written
    assert found.activation_bytes + found.scores_bytes == 4 * (3 * one + scores)
    softmax = parse("(float[1,128,128] x) => (float[1,128,128] y) { e = Exp(x) y = Softmax <axis = -1> (e) }")
    assert footprint(softmax, precision="fp32").scores_bytes == 0  # no attention


def test_constants_that_share_a_place_are_counted_once(parse: Any, tmp_path: Path) -> None:
    import onnx

    one = parse("(float[8,8] x) => (float[8,8] y) { h = MatMul(x, w) y = MatMul(h, w) }", w=floats(8, 8))
    assert footprint(one, precision="fp32").weights_bytes == 4 * 64

    path = write_external(tmp_path, ("w", "v"))
    assert footprint(graph_io.load(path), precision="fp32").weights_bytes == 2 * 4 * 10**10
    proto = onnx.load(str(path), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "0" if entry.key == "offset" else entry.value
    path.write_bytes(proto.SerializeToString())
    assert footprint(graph_io.load(path), precision="fp32").weights_bytes == 4 * 10**10


def write_external(folder: Path, names: tuple[str, ...]) -> Path:
    """A graph with 40 GB for each weight in a file of zeros that takes no place on the disk."""
    import onnx
    from onnx import TensorProto, helper

    side = 10**5
    weights = []
    for index, name in enumerate(names):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[side, side])
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": "weights", "offset": 4 * side * side * index, "length": 4 * side * side}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        weights.append(tensor)
    with (folder / "weights").open("wb") as file:
        file.truncate(4 * side * side * len(names))
    values = ["x", *(f"h{i}" for i in range(len(names)))]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [values[i], name], [values[i + 1]]) for i, name in enumerate(names)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, side])],
        [helper.make_tensor_value_info(values[-1], TensorProto.FLOAT, [1, side])],
        weights,
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def test_weights_stay_on_disk(tmp_path: Path) -> None:
    path = write_external(tmp_path, ("w",))
    assert read(path, "int8").weights_bytes == 10**10 + 2 * 10**5
    assert read(path, "int8").total_bytes < 16 * 10**9 < read(path, "fp16").total_bytes


def test_unknown_shapes_are_told(parse: Any) -> None:
    model = parse("(float[N,8] x) => (float[N,8] y) { h = Relu(x) y = Neg(h) }")
    assert footprint(model, precision="fp32").unknown_shapes == 2


def test_unreadable_graphs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x00not a graph\xff" * 10)
    with pytest.raises(ModelError, match="is not an ONNX file"):
        read(tmp_path / "bad.onnx", "fp32")
    with pytest.raises(ModelError, match="there is no ONNX file"):
        read(tmp_path / "none.onnx", "fp32")


def test_weights_outside_the_graphs_folder_are_refused(unet_like: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(str(unet_like))
    path = tmp_path / "external.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights", size_threshold=64)
    assert read(path, "fp32") == read(unet_like, "fp32")
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        read(path, "fp32")
