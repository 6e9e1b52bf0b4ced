from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtu_compile.accuracy.formulas import sqnr_db
from targets.openvino.ir import keep_angles_precise, read_graph, write_ir

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def run_ir(path: Path, feed: dict[str, Any], precision: str) -> np.ndarray:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": precision})
    return compiled(feed)[0]


def build(graph: Path, folder: Path, *, precise: bool, fp16: bool = False) -> Path:
    model = read_graph(graph)
    if precise:
        assert keep_angles_precise(model) == 1
    folder.mkdir()
    return write_ir(model, folder, fp16_weights=fp16)


def test_the_rewrite_changes_nothing_in_f32(unet_like, feeds, run_reference, tmp_path):
    path = build(unet_like, tmp_path / "ir", precise=True)
    for feed in feeds:
        assert sqnr_db(run_reference(unet_like, feed), run_ir(path, feed, "f32")) > 100


@pytest.mark.parametrize("fp16", [False, True])
def test_late_timesteps_survive_bf16(unet_like, feeds, run_reference, native_bf16, tmp_path, fp16):
    plain = build(unet_like, tmp_path / "plain", precise=False, fp16=fp16)
    precise = build(unet_like, tmp_path / "precise", precise=True, fp16=fp16)
    assert sorted(path.name for path in precise.parent.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    reference = run_reference(unet_like, feeds[0])
    kept = sqnr_db(reference, run_ir(precise, feeds[0], "bf16" if native_bf16 else "f32"))
    assert kept > 30
    if native_bf16:  # elsewhere OpenVINO computes in f32 and there is nothing to lose
        assert sqnr_db(reference, run_ir(plain, feeds[0], "bf16")) < kept - 10


def test_fp16_storage_keeps_the_angles_in_f32(unet_like, feeds, run_reference, tmp_path):
    reference = run_reference(unet_like, feeds[0])
    precise = build(unet_like, tmp_path / "precise", precise=True, fp16=True)
    plain = build(unet_like, tmp_path / "plain", precise=False, fp16=True)
    assert sqnr_db(reference, run_ir(precise, feeds[0], "f32")) > sqnr_db(reference, run_ir(plain, feeds[0], "f32")) + 6


def test_a_vector_of_angles_is_reshaped_not_repeated(tmp_path):
    """SDXL's size conditions: [batch, 6] values, one embedding each."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    frequencies = np.exp(-np.arange(8, dtype=np.float32))[None]
    nodes = [
        helper.make_node("Reshape", ["time_ids", "flat"], ["ids"]),
        helper.make_node("Mul", ["ids", "freqs"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "ids",
        [helper.make_tensor_value_info("time_ids", TensorProto.FLOAT, [2, 6])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [12, 8])],
        [
            numpy_helper.from_array(np.array([12, 1], np.int64), "flat"),
            numpy_helper.from_array(frequencies, "freqs"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "ids.onnx"))
    path = build(tmp_path / "ids.onnx", tmp_path / "ir", precise=True)
    feed = {"time_ids": np.arange(990, 1002, dtype=np.float32).reshape(2, 6)}
    expected = np.sin(feed["time_ids"].reshape(12, 1) * frequencies)
    assert sqnr_db(expected, run_ir(path, feed, "bf16")) > 40


def test_other_sines_are_left_alone(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Mul", ["x", "y"], ["m"]), helper.make_node("Sin", ["m"], ["out"])]
    info = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y", "out")}
    graph = helper.make_graph(nodes, "g", [info["x"], info["y"]], [info["out"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "g.onnx"))
    assert keep_angles_precise(read_graph(tmp_path / "g.onnx")) == 0


@pytest.mark.parametrize("fp16", [False, True])
def test_small_constants_lie_together_before_the_others(fp16: bool, tmp_path: Path) -> None:
    """What kernels read in the file as they run keeps the pages around it in memory."""
    import openvino
    from openvino import opset13 as ops

    large, rng = (256, 256), np.random.default_rng(0)
    x = ops.parameter([1, 256], np.float32, name="x")
    y = x
    for _ in range(3):
        weight, bias = (ops.constant(rng.standard_normal(shape, dtype=np.float32)) for shape in (large, (1, 256)))
        y = ops.add(ops.matmul(y, weight, False, False), bias)
    path = write_ir(openvino.Model([ops.result(y)], [x], "net"), tmp_path, fp16_weights=fp16)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]
    places = [(int(one["offset"]), int(one["size"])) for one in constants(path)]
    small = [place for place in places if place[1] < 256 * 8]
    assert len(small) == 3 and len(places) - len(small) == 3
    assert max(small) < min(place for place in places if place not in small)
    expected = openvino.Core().compile_model(openvino.Model([ops.result(y)], [x], "net"), "CPU", F32)
    feed = {"x": rng.standard_normal((1, 256), dtype=np.float32)}
    assert sqnr_db(expected(feed)[0], run_ir(path, feed, "f32")) > (50 if fp16 else 120)


def constants(path: Path) -> list[dict[str, str]]:
    layers = ElementTree.parse(path).getroot().iter("layer")
    return [layer.find("data").attrib for layer in layers if layer.get("type") == "Const"]
