"""One scale for a loud and a quiet task: what factors before and behind the layers are worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from calibration.aligning import AlignSettings, align, factors_of, lost_bits
from calibration.quant_settings import QuantSettings
from calibration.quantize import quantize_onnx
from mtu_compile.bundle.quantisation import AlignmentRecord
from mtu_compile.core.errors import CalibrationError, ConfigError
from mtu_compile.core.schema import conform

C, H = 8, 4
INT8 = QuantSettings(smooth_quant_alpha=None, range_estimator="histogram")
#: What the tasks' tables make of the same input: the second is 1/16 of the first.
TABLE = np.array([1.0, 1 / 16], np.float32)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks: ``Conv(SiLU(x · table[task]))``, and a linear layer behind a product with the same table."""
    random = np.random.default_rng(0)
    weights = {
        "table": TABLE.reshape(2, 1, 1, 1),
        "table3": TABLE.reshape(2, 1, 1),
        "w_conv": random.standard_normal((C, C, 3, 3)) / 9,
        "b_conv": random.standard_normal(C) / 16,
        "w_up": random.standard_normal((C, C)) / 3,
        "b_up": random.standard_normal(C) / 16,
        "to_tokens": np.array([0, C, H * H], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["table", "task"], ["c4"], name="c4"),
        helper.make_node("Gather", ["table3", "task"], ["c3"], name="c3"),
        helper.make_node("Mul", ["sample", "c4"], ["scaled"], name="scale"),
        helper.make_node("Tanh", ["scaled"], ["act"], name="act"),
        helper.make_node("Conv", ["act", "w_conv", "b_conv"], ["convolved"], name="net.conv/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["convolved", "to_tokens"], ["flat"], name="flat"),
        helper.make_node("Transpose", ["flat"], ["tokens"], name="tokens", perm=[0, 2, 1]),
        helper.make_node("Softsign", ["tokens"], ["soft"], name="soft"),
        helper.make_node("Mul", ["soft", "c3"], ["gated"], name="gate"),
        helper.make_node("MatMul", ["gated", "w_up"], ["up"], name="net.up/MatMul"),
        helper.make_node("Add", ["up", "b_up"], ["out"], name="net.up/Add"),
    ]
    batch = "batch"
    graph = helper.make_graph(
        nodes,
        "two tasks",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, [batch, C, H, H]),
            helper.make_tensor_value_info("task", TensorProto.INT64, [batch]),
        ],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, H * H, C])],
        [
            numpy_helper.from_array(value if value.dtype.kind == "i" else value.astype("f4"), name)
            for name, value in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path_factory.mktemp("aligning") / "float.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def calls(task: int, count: int = 12, batch: int = 2) -> list[dict[str, Any]]:
    random = np.random.default_rng(task)
    sample = random.standard_normal((count, batch, C, H, H)).astype("f4")
    return [{"sample": one, "task": np.full(batch, task, np.int64)} for one in sample]


INPUTS = {"loud": calls(0), "quiet": calls(1)}


def run(graph: Path, feed: dict[str, Any]) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    (out,) = ort.InferenceSession(str(graph), options, ["CPUExecutionProvider"]).run(None, feed)
    return out


def varying_sqnr_db(graph: Path, wanted: Path, feed: dict[str, Any]) -> float:
    """Of what differs from sample to sample: biases are float in every graph."""
    signal, given = run(wanted, feed).astype("f8"), run(graph, feed).astype("f8")
    return float(10 * np.log10(signal.var(axis=(0, 1)).sum() / np.mean((given - signal) ** 2, axis=(0, 1)).sum()))


def test_the_quiet_task_gets_its_bits_back(shared: Path, tmp_path: Path) -> None:
    report = align(shared, tmp_path / "aligned.onnx", INPUTS, quantisation=INT8)
    assert set(report.layers) == {"net.conv/Conv", "net.up/MatMul"} and report.measured == 2 and not report.left
    for layer in report.layers.values():
        assert layer.factors["loud"] == 1 and layer.factors["quiet"] >= 4
        assert layer.before["quiet"] > 1.5 and max(layer.after.values()) < 1
    for feeds in INPUTS.values():
        np.testing.assert_array_equal(run(tmp_path / "aligned.onnx", feeds[0]), run(shared, feeds[0]))
    everything = [*INPUTS["loud"], *INPUTS["quiet"]]
    quantize_onnx(shared, everything, tmp_path / "plain8.onnx", settings=INT8)
    quantize_onnx(tmp_path / "aligned.onnx", everything, tmp_path / "aligned8.onnx", settings=INT8)
    gained = {
        task: varying_sqnr_db(tmp_path / "aligned8.onnx", shared, feeds[0])
        - varying_sqnr_db(tmp_path / "plain8.onnx", shared, feeds[0])
        for task, feeds in INPUTS.items()
    }
    assert gained["quiet"] > 10 and gained["loud"] > -2


def test_the_report_is_what_a_manifest_keeps(shared: Path, tmp_path: Path) -> None:
    report = align(shared, tmp_path / "aligned.onnx", INPUTS, quantisation=INT8)
    record = conform(AlignmentRecord, report.to_json())
    assert record.layers["net.conv/Conv"].factors == report.layers["net.conv/Conv"].factors
    assert record.worst_after["quiet"] < 1 < 2 < record.worst_before["quiet"]


def test_alike_tasks_are_left_alone_and_the_graph_is_written_all_the_same(shared: Path, tmp_path: Path) -> None:
    inputs = {"one": calls(0), "other": calls(0)}
    report = align(shared, tmp_path / "aligned.onnx", inputs, quantisation=INT8)
    assert report.layers == {} and set(report.worst_before.values()) == {0.0}
    assert [node.op_type for node in onnx.load(tmp_path / "aligned.onnx").graph.node] == [
        node.op_type for node in onnx.load(shared).graph.node
    ]


def test_a_limit_a_rounding_and_a_silent_task() -> None:
    lost = lost_bits({"a": {"x": 8.0, "y": 1.0}, "b": {"x": 1.5, "y": 0.8}, "silent": {"x": 0.0, "y": 0.0}})
    assert lost["x"] == {"a": 0.0, "b": pytest.approx(2.415, abs=1e-3), "silent": 0.0}
    assert factors_of(lost["x"], AlignSettings()) == {"a": 1.0, "b": 4.0, "silent": 1.0}
    assert factors_of(lost["x"], AlignSettings(powers_of_two=False))["b"] == pytest.approx(16 / 3)
    assert set(factors_of(lost["x"], AlignSettings(limit_bits=2.5)).values()) == {1.0}
    assert set(factors_of(lost["y"], AlignSettings()).values()) == {1.0}


def test_bad_inputs_and_settings_are_refused(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "aligned.onnx"
    with pytest.raises(CalibrationError, match="no tasks"):
        align(shared, out, {})
    with pytest.raises(CalibrationError, match="no inputs of task 'quiet'"):
        align(shared, out, {"loud": calls(0), "quiet": []})
    with pytest.raises(CalibrationError, match=r"not of one task: rows \[0, 1\]"):
        align(shared, out, {"mixed": [*calls(0), *calls(1)]})
    with pytest.raises(ConfigError, match="limit of bits"):
        AlignSettings(limit_bits=-1.0)
    assert not out.exists()
