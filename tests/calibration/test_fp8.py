"""FP8 from a graph that stands for what NNCF makes: a convolution, a norm, a linear layer and attention scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import passes
from calibration.fp8 import FP8_MAX, GEMMS, Fp8Report, to_fp8
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io

C, TOKENS = 16, 16
RNG = np.random.default_rng(0)
FLOATS = {
    "w_conv": RNG.standard_normal((C, C, 1, 1)).astype(np.float32) / 4,
    "w_up": RNG.standard_normal((C, C)).astype(np.float32) / 4,
    "gamma": np.ones(C, np.float32),
    "tokens": np.array([1, C, TOKENS], np.int64),
}
NODES = [
    ("Conv", ["x", "w_conv"], "c", {}),
    ("Reshape", ["c", "tokens"], "r", {}),
    ("Transpose", ["r"], "t", {"perm": [0, 2, 1]}),
    ("LayerNormalization", ["t", "gamma"], "n", {}),
    ("MatMul", ["n", "w_up"], "u", {}),
    ("Transpose", ["u"], "ut", {"perm": [0, 2, 1]}),
    ("MatMul", ["u", "ut"], "y", {}),
]
#: Activation quantisers by value, and weights with their channels' axis.
SCALES = {"x": 3.5 / 127, "n": 3.0 / 127, "u": 5.0 / 127, "ut": 5.0 / 127}
AXES = {"w_conv": 0, "w_up": 1}


def write(path: Path, *, int8: bool, floats: dict[str, Any] = FLOATS) -> Path:
    values = dict(floats)
    nodes = []

    def dequantised(name: str) -> str:
        if not int8:
            return name
        if name in AXES:
            axes = tuple(i for i in range(floats[name].ndim) if i != AXES[name])
            scale = np.abs(floats[name]).max(axis=axes, keepdims=True) / 127
            values[f"{name}_int8"] = np.rint(floats[name] / scale).astype(np.int8)
            values[f"{name}_s"], values[f"{name}_z"] = scale.ravel().astype("f4"), np.zeros(C, np.int8)
            inputs, attributes = [f"{name}_int8", f"{name}_s", f"{name}_z"], {"axis": AXES[name]}
        else:
            values[f"{name}_s"], values[f"{name}_z"] = np.float32(SCALES[name]), np.int8(0)
            constants = [f"{name}_s", f"{name}_z"]
            nodes.append(helper.make_node("QuantizeLinear", [name, *constants], [f"{name}_q"], name=f"{name}/q"))
            inputs, attributes = [f"{name}_q", *constants], {}
        node = helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], name=f"{name}/dq", **attributes)
        nodes.append(node)
        return f"{name}_dq"

    for number, (op, inputs, output, attributes) in enumerate(NODES):
        names = [dequantised(name) for name in inputs] if op in ("Conv", "MatMul") else inputs
        nodes.append(helper.make_node(op, names, [output], name=f"layer_{number}", **attributes))
    info = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, C, 4, 4])]
    out = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, TOKENS, TOKENS])]
    initializers = [numpy_helper.from_array(np.asarray(v), n) for n, v in values.items() if not int8 or n not in AXES]
    graph = helper.make_graph(nodes, "block", info, out, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """(INT8 graph, float graph)"""
    return write(tmp_path / "int8.onnx", int8=True), write(tmp_path / "float.onnx", int8=False)


def run(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    x = np.random.default_rng(1).standard_normal((1, C, 4, 4)).astype(np.float32)
    return ort.InferenceSession(str(path), options, ["CPUExecutionProvider"]).run(None, {"x": x})[0]


def quantisers(path: Path) -> dict[str, ir.Node]:
    return {n.name or "": n for n in graph_io.load(path).graph if n.op_type in ("QuantizeLinear", "DequantizeLinear")}


def test_gemms_become_fp8_and_convolutions_float(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "fp8.onnx"
    report = to_fp8(*pair, out)
    assert (report.activations, report.weights, report.dropped) == (3, 1, 1)
    assert report.layers == {"Conv": (0, 1), "MatMul": (2, 2)}
    assert report.to_json()["layers"] == {"Conv": [0, 1], "MatMul": [2, 2]}
    nodes = quantisers(out)
    assert "x/q" not in nodes and len(nodes) == 7
    for node in nodes.values():
        assert node.inputs[2].dtype == ir.DataType.FLOAT8E4M3FN  # type: ignore[union-attr]
    stored = graph_io.load(out).graph.initializers
    assert {v.dtype for n, v in stored.items() if n.startswith("w_conv")} == {ir.DataType.FLOAT}
    exact = run(pair[1])
    assert 25 < sqnr_db(exact, run(out)) < 60
    onnx.checker.check_model(str(out), full_check=True)


def test_ranges_are_those_of_int8(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "fp8.onnx"
    to_fp8(*pair, out)
    nodes = quantisers(out)
    for name in ("n", "u", "ut"):
        scale = float(nodes[f"{name}/q"].inputs[1].const_value.numpy())  # type: ignore[union-attr]
        assert 1 <= scale * FP8_MAX / (SCALES[name] * 127) <= 1.008  # to the next bfloat16
        assert np.float32(np.float16(scale)) == scale


def test_weights_are_rounded_from_the_float_ones(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Once: by half of E4M3's step of 2⁻³ at most, not from integers."""
    out = tmp_path / "fp8.onnx"
    to_fp8(*pair, out)
    node = quantisers(out)["layer_4/DequantizeLinear_1"]
    numbers, scale = (node.inputs[i].const_value.numpy().astype(np.float64) for i in (0, 1))  # type: ignore[union-attr]
    error = np.abs(numbers * scale - FLOATS["w_up"])
    assert (error <= np.maximum(2.0**-4 * np.abs(FLOATS["w_up"]), scale * 2.0**-10) * 1.001).all()
    assert error.max() > 0


def test_layers_can_be_chosen(pair: tuple[Path, Path], tmp_path: Path) -> None:
    report = to_fp8(*pair, tmp_path / "fp8.onnx", layers=(*GEMMS, "Conv"))
    assert report.layers == {"Conv": (1, 1), "MatMul": (2, 2)} and report.dropped == 0
    with pytest.raises(PassError, match="no weight was quantised"):
        to_fp8(*pair, tmp_path / "none.onnx", layers=())
    assert not (tmp_path / "none.onnx").exists()


def test_graphs_that_do_not_belong_together_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write(tmp_path / "other.onnx", int8=False, floats=FLOATS | {"w_up": FLOATS["w_up"][::-1].copy()})
    with pytest.raises(PassError, match=r"weight of 'w_up/dq' is .* steps off the float graph's") as caught:
        to_fp8(pair[0], other, tmp_path / "out.onnx")
    assert "smooth-quant" in str(caught.value.hint)
    renamed = onnx.load(str(pair[1]))
    renamed.graph.node[4].name = "another"
    onnx.save(renamed, str(other))
    with pytest.raises(PassError, match=r"other\.onnx has no MatMul called 'layer_4'"):
        to_fp8(pair[0], other, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_external_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    graphs = []
    for path in pair:
        folder = tmp_path / "external" / path.stem
        graphs.append(graph_io.save(graph_io.load(path), folder / "model.onnx", external_bytes=0))
    to_fp8(*pair, tmp_path / "plain.onnx")
    to_fp8(graphs[0], graphs[1], tmp_path / "external.onnx")
    np.testing.assert_array_equal(run(tmp_path / "plain.onnx"), run(tmp_path / "external.onnx"))


def test_it_lowers_to_half_without_losing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    fp8, half = tmp_path / "fp8.onnx", tmp_path / "half.onnx"
    report: Fp8Report = to_fp8(*pair, fp8)
    assert report.bytes_after > 0
    passes.run_pipeline(fp8, half, ("mtu::legalise-qdq", "mtu::to-fp16"), passes.PassContext())
    before, after = quantisers(fp8), quantisers(half)
    assert before.keys() == after.keys()
    for name, node in before.items():
        scales = [float(one.inputs[1].const_value.numpy()) for one in (node, after[name])]  # type: ignore[union-attr]
        assert scales[0] == scales[1]
    exact = run(pair[1])
    assert abs(sqnr_db(exact, run(fp8)) - sqnr_db(exact, run(half))) < 1.5


@pytest.mark.parametrize("capability", ["8.9", "12.0"])
def test_tensorrt_rtx_builds_it(capability: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from targets.nvidia.builder import Recipe, build_engine

    fp8, half = tmp_path / "fp8.onnx", tmp_path / "half.onnx"
    to_fp8(*pair, fp8)
    passes.run_pipeline(fp8, half, ("mtu::legalise-qdq", "mtu::to-fp16"), passes.PassContext())
    recipe = Recipe(compute_capabilities=(capability,))
    assert build_engine(half, tmp_path / "fp8.engine", recipe, kind="tensorrt-rtx").bytes > 0
