"""Weights in INT8 and INT4 by the real NNCF: a convolution, a Gemm, two linear layers and attention scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import passes
from calibration.compress import CompressSettings, compress_onnx
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.core.errors import ConfigError, ModelError, PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq
from mtu_compile.runtime.engine import open_engine
from targets.openvino.host import HOST_CONFIG

C, TOKENS = 128, 16
RNG = np.random.default_rng(0)
WEIGHTS: Mapping[str, Any] = {
    "w_conv": RNG.standard_normal((C, C, 3, 3)).astype(np.float32) / 34,
    "w_time": RNG.standard_normal((C, C)).astype(np.float32) / 11,
    "w_up": RNG.standard_normal((C, 2 * C)).astype(np.float32) / 11,
    "w_down": RNG.standard_normal((2 * C, C)).astype(np.float32) / 16,
    "w_last": RNG.standard_normal((C, C)).astype(np.float32) / 11,
}
NODES = [
    ("Conv", ["x", "w_conv"], "c", {"pads": [1, 1, 1, 1]}),
    ("Gemm", ["t", "w_time"], "e", {"transB": 1}),
    ("Unsqueeze", ["e", "axes"], "e4", {}),
    ("Add", ["c", "e4"], "a", {}),
    ("Reshape", ["a", "tokens"], "r", {}),
    ("Transpose", ["r"], "h", {"perm": [0, 2, 1]}),
    ("MatMul", ["h", "w_up"], "u", {}),
    ("Relu", ["u"], "v", {}),
    ("MatMul", ["v", "w_down"], "d", {}),
    ("Transpose", ["d"], "dt", {"perm": [0, 2, 1]}),
    ("MatMul", ["d", "dt"], "s", {}),
    ("Softmax", ["s"], "p", {}),
    ("MatMul", ["p", "d"], "m", {}),
    ("MatMul", ["m", "w_last"], "y", {}),
]
FEED = {
    "x": RNG.standard_normal((1, C, 4, 4)).astype(np.float32),
    "t": RNG.standard_normal((1, C)).astype(np.float32),
}


def write(path: Path, weights: Mapping[str, Any] = WEIGHTS, nodes: Any = NODES) -> Path:
    values = {**weights, "axes": np.array([2, 3]), "tokens": np.array([1, C, TOKENS])}
    made = [helper.make_node(kind, inputs, [out], name=out, **more) for kind, inputs, out, more in nodes]
    read = {name for node in made for name in node.input}
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in FEED.items()]
    out = helper.make_tensor_value_info(made[-1].output[0], TensorProto.FLOAT, None)
    constants = [numpy_helper.from_array(array, name) for name, array in values.items() if name in read]
    graph = helper.make_graph(made, "g", info, [out], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def run(path: Path, kind: str = "onnxruntime") -> Any:
    return open_engine(kind, path, HOST_CONFIG if kind == "openvino" else {})(FEED)["y"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain") / "model.onnx")


NUMBERS = sum(array.size for array in WEIGHTS.values())
LINEAR = NUMBERS - WEIGHTS["w_conv"].size - WEIGHTS["w_last"].size  # NNCF leaves the last one in INT8


@pytest.mark.parametrize(
    ("mode", "layers", "least_db"),
    [
        ("int8", {"Conv": {"int8": 1}, "Gemm": {"int8": 1}, "MatMul": {"int8": 3}}, 35),
        ("int4", {"Conv": {"int8": 1}, "Gemm": {"int4": 1}, "MatMul": {"int4": 2, "int8": 1}}, 10),
    ],
)
def test_every_layer_gets_integers_and_computes_nearly_the_same_on_both_runtimes(
    plain: Path, tmp_path: Path, mode: Any, layers: Any, least_db: float
) -> None:
    out = tmp_path / "out.onnx"
    report = compress_onnx(plain, out, settings=CompressSettings(mode))
    assert report.layers == layers
    assert report.parameters == ({"int8": NUMBERS} if mode == "int8" else {"int8": NUMBERS - LINEAR, "int4": LINEAR})
    weights = NUMBERS if mode == "int8" else NUMBERS - LINEAR / 2 + 4 * LINEAR / 64
    assert report.bytes_after == out.stat().st_size
    assert weights < report.bytes_after < 1.05 * weights + 4096
    assert report.bytes_before == plain.stat().st_size > 3.5 * report.bytes_after
    assert report.tool.startswith("nncf 3.")
    onnx.checker.check_model(str(out), full_check=True)
    found = {kind: run(out, kind) for kind in ("onnxruntime", "openvino")}
    assert sqnr_db(run(plain), found["onnxruntime"]) > least_db
    # Both would round activations to INT8, each in its own way, if they were let: they agree to 40 dB then.
    assert sqnr_db(found["onnxruntime"], found["openvino"]) > 90


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_what_tensorrt_refuses_is_not_there(plain: Path, tmp_path: Path, mode: Any) -> None:
    """Symmetric, positive scales of the shape ONNX says, and never a quantised activation."""
    report = compress_onnx(plain, tmp_path / "out.onnx", settings=CompressSettings(mode))
    assert report.rounded_again > 100  # about half of all groups have a positive largest weight
    found = list(qdq.quantisers(graph_io.load(tmp_path / "out.onnx")))
    assert {node.op_type for node in found} == {"DequantizeLinear"} and len(found) == len(WEIGHTS)
    for node in found:
        qdq.check_quantiser(node, (qdq.INT8, ir.DataType.INT4))
        packed, scale = (qdq.constant(value) for value in node.inputs[:2])
        assert packed is not None and scale is not None
        assert (scale.numpy() > 0).all()
        shape, axis = list(packed.shape.numpy()), node.attributes.get_int("axis")
        if packed.dtype == ir.DataType.INT4:
            assert node.attributes.get_int("block_size") == 64
            shape[axis] //= 64
            assert list(scale.shape.numpy()) == shape
        else:
            assert "block_size" not in node.attributes
            assert list(scale.shape.numpy()) == [shape[axis]]


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_each_weight_is_off_by_half_a_step_at_most_where_it_is_read(plain: Path, tmp_path: Path, mode: Any) -> None:
    """A wrong axis, as NNCF writes it for blocks of a transposed Gemm, would be off by many steps."""
    compress_onnx(plain, tmp_path / "out.onnx", settings=CompressSettings(mode))
    for node in qdq.quantisers(graph_io.load(tmp_path / "out.onnx")):
        packed, scale = (qdq.constant(value) for value in node.inputs[:2])
        assert packed is not None and scale is not None
        axis, block = node.attributes.get_int("axis"), node.attributes.get_int("block_size", 0)
        integers, steps = packed.numpy().astype(np.float32), scale.numpy()
        if block:
            steps = np.repeat(steps, block, axis)
        else:
            steps = steps.reshape([-1 if d == axis else 1 for d in range(integers.ndim)])
        weight = WEIGHTS[str(node.inputs[0].name).removesuffix("_quantized")]  # type: ignore[union-attr]
        off = np.abs(weight / steps - integers)
        # Where NNCF's range is -8 to 7, a largest weight just below 8 steps is cut.
        assert off.max() <= 1.0 and np.quantile(off, 0.99) <= 0.5 + 1e-4


def test_the_ratio_leaves_linear_layers_in_int8(plain: Path, tmp_path: Path) -> None:
    shares = []
    for ratio in (0.0, 0.5, 1.0):
        report = compress_onnx(plain, tmp_path / "out.onnx", settings=CompressSettings("int4", ratio=ratio))
        shares.append(report.parameters.get("int4", 0) / NUMBERS)
    assert shares[0] == 0 < shares[1] < shares[2]


def test_blocks_shrink_for_layers_they_do_not_divide(tmp_path: Path) -> None:
    odd = {**WEIGHTS, "w_up": WEIGHTS["w_up"][:, :224], "w_down": WEIGHTS["w_down"][:224]}
    compress_onnx(write(tmp_path / "m.onnx", odd), tmp_path / "out.onnx", settings=CompressSettings("int4"))
    graph = graph_io.load(tmp_path / "out.onnx")
    blocks = {str(n.inputs[0].name): n.attributes.get_int("block_size", 0) for n in qdq.quantisers(graph)}  # type: ignore[union-attr]
    assert (blocks["w_up_quantized"], blocks["w_down_quantized"]) == (64, 32)
    assert sqnr_db(run(tmp_path / "m.onnx"), run(tmp_path / "out.onnx")) > 10


def test_what_is_ignored_stays_float(plain: Path, tmp_path: Path) -> None:
    report = compress_onnx(plain, tmp_path / "out.onnx", settings=CompressSettings(ignored_scopes=("Conv",)))
    assert report.layers["Conv"] == {"float": 1}
    with pytest.raises(ConfigError, match="matches no node"):
        compress_onnx(plain, tmp_path / "out.onnx", settings=CompressSettings(ignored_scopes=("nothing",)))


def test_weights_in_a_file_of_their_own_give_the_same(plain: Path, tmp_path: Path) -> None:
    apart = graph_io.save(graph_io.load(plain), tmp_path / "apart.onnx", external_bytes=0)
    assert (tmp_path / "apart.onnx.data").stat().st_size > 3 * NUMBERS
    for source, out in ((plain, "a.onnx"), (apart, "b.onnx")):
        compress_onnx(source, tmp_path / out, settings=CompressSettings("int4"))
    np.testing.assert_array_equal(run(tmp_path / "a.onnx"), run(tmp_path / "b.onnx"))


def test_what_cannot_be_compressed_is_refused(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'int2'"):
        CompressSettings("int2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ratio"):
        CompressSettings("int4", ratio=1.5)
    with pytest.raises(ConfigError, match="group size 48"):
        CompressSettings("int4", group_size=48)
    compress_onnx(plain, tmp_path / "once.onnx")
    with pytest.raises(ModelError, match="quantised already"):
        compress_onnx(tmp_path / "once.onnx", tmp_path / "twice.onnx")
    none = write(tmp_path / "none.onnx", nodes=[("Relu", ["x"], "r", {}), ("Unsqueeze", ["t", "axes"], "u", {})])
    with pytest.raises(PassError, match="no weight was compressed"):
        compress_onnx(none, tmp_path / "out.onnx")
    groups = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    norm = [("GroupNormalization", ["x", "scale", "bias"], "n", {"num_groups": 8}), *NODES]
    old = write(tmp_path / "norm.onnx", {**WEIGHTS, **groups}, norm)
    with pytest.raises(PassError, match="'n' means something else in opset 21"):
        compress_onnx(old, tmp_path / "out.onnx", settings=CompressSettings("int4"))
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("scale", [1.0, 2.0**-14])
def test_half_precision_keeps_the_weights(tmp_path: Path, mode: Any, scale: float) -> None:
    """Also where they are so small that fp16 cannot hold their scales: 7 steps of 2e-6 are no number of fp16."""
    weights = {**WEIGHTS, "w_down": WEIGHTS["w_down"] * np.float32(scale)}
    model = write(tmp_path / "m.onnx", weights)
    compress_onnx(model, tmp_path / "c.onnx", settings=CompressSettings(mode))
    half = tmp_path / "half.onnx"
    passes.run_pipeline(tmp_path / "c.onnx", half, ("mtu::to-fp16",), passes.PassContext())
    graph = graph_io.load(half)
    types = {str(n.inputs[0].name): n.outputs[0].dtype for n in qdq.quantisers(graph)}  # type: ignore[union-attr]
    assert types["w_up_quantized"] == types["w_down_quantized"] == ir.DataType.FLOAT16
    passes.write_simulation(half, tmp_path / "simulated.onnx")
    wanted = run(model)
    assert sqnr_db(wanted, run(tmp_path / "simulated.onnx")) > sqnr_db(wanted, run(tmp_path / "c.onnx")) - 2
