"""An IR that rounds to float16: every number it passes on is one of float16's, on whatever CPU it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.runtime.engine import open_engine
from targets.openvino.half_ir import HalfEngine, RoundHalf, simulate_half_ir
from targets.openvino.host import HOST_CONFIG
from targets.openvino.ir import keep_angles_precise, read_graph, whole_timesteps, write_ir


def written(graph: Path, folder: Path, *, fp16_weights: bool = True) -> Path:
    """As a target for Intel GPUs writes it."""
    model = read_graph(graph)
    keep_angles_precise(model)
    whole_timesteps(model)
    folder.mkdir()
    return write_ir(model, folder, fp16_weights=fp16_weights)


def kinds(model: Any) -> list[str]:
    return [node.get_type_name() for node in model.get_ops()]


def test_rounding_costs_what_float16_costs(unet_like, feeds, run_reference, tmp_path):
    path = written(unet_like, tmp_path / "ir")
    exact, rounded = open_engine("openvino", path, HOST_CONFIG), HalfEngine(path)
    for feed in feeds:
        wanted = run_reference(unet_like, feed)
        found = sqnr_db(wanted, rounded(feed)["out_sample"])
        assert 45 < found < 75 and found < sqnr_db(wanted, exact(feed)["out_sample"]) - 3
        output = rounded(feed)["out_sample"]
        assert np.array_equal(output, output.astype(np.float16).astype(np.float32))


def test_angles_are_not_rounded_and_late_timesteps_differ(unet_like, feeds, run_reference, tmp_path):
    """999 and 1000 are the same in bfloat16; float16 has both, and no fraction of their angles."""
    import openvino

    model = openvino.Core().read_model(str(written(unet_like, tmp_path / "ir")))
    assert simulate_half_ir(model) > 0
    for node in model.get_ops():
        if node.get_type_name() in ("Sin", "Cos"):
            angle = node.input_value(0).get_node()
            assert angle.get_type_name() == "Multiply"
            assert all(value.get_node().get_type_name() != "RoundHalf" for value in angle.input_values())


Make = Callable[..., Path]


@pytest.fixture
def matmul(tmp_path: Path) -> Make:
    """``matmul(weight, *more)``: y = x · weight · …, of the 2 by 2 unit matrix times each."""

    def make(*weights: float) -> Path:
        import openvino
        from openvino import opset13 as ops

        x = ops.parameter([1, 2], np.float32, name="x")
        x.output(0).set_names({"x"})
        last: Any = x
        for weight in weights:
            last = ops.matmul(last, ops.constant(np.eye(2, dtype=np.float32) * np.float32(weight)), False, False)
        last.output(0).set_names({"y"})
        path = tmp_path / "model.xml"
        openvino.save_model(openvino.Model([ops.result(last)], [x], "m"), str(path), compress_to_fp16=False)
        return path

    return make


def test_numbers_beyond_float16_are_infinite(matmul: Make) -> None:
    path = matmul(1e3, 1e-3)
    exact, rounded = open_engine("openvino", path, HOST_CONFIG), HalfEngine(path)
    for size, finite in ((50, True), (70, False)):
        feed = {"x": np.array([[size, -size]], np.float32)}
        assert np.allclose(exact(feed)["y"], feed["x"])
        assert bool(np.isfinite(rounded(feed)["y"]).all()) is finite


def test_small_numbers_and_weights_are_rounded_too(matmul: Make) -> None:
    feed = {"x": np.array([[1, 2.0**-26]], np.float32)}
    found = HalfEngine(matmul(1 + 2.0**-12, 1))(feed)["y"]
    assert found.tolist() == [[1, 0]]


def test_a_weight_beyond_float16_is_cut_off_as_openvino_does(matmul: Make) -> None:
    found = HalfEngine(matmul(1e6))({"x": np.array([[0.5, 1]], np.float32)})["y"]
    assert found.tolist() == [[32752, 65504]]


QUANTISED = """
import sys
import numpy as np
from pathlib import Path
from targets.openvino.half_ir import HalfEngine

out = HalfEngine(Path(sys.argv[1]))({"x": np.load(sys.argv[2])})["y"]
np.save(sys.argv[3], out)
"""


def test_int8_layers_are_the_same_on_every_cpu(tmp_path: Path) -> None:
    """Convolutions of signed INT8 that lesser CPUs run with half the resolution, judged by their numbers alone."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8)
    constants = {"s": np.float32(0.02), "z": np.int8(0), "w": weight, "ws": np.float32(0.01)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "z"], ["wd"]),
        helper.make_node("Conv", ["d", "wd"], ["y"], pads=[1, 1, 1, 1]),
    ]
    border = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 12, 12]) for name in "xy"]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", border[:1], border[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "model.onnx")
    path = written(tmp_path / "model.onnx", tmp_path / "ir", fp16_weights=False)
    x = (rng.standard_normal((1, 16, 12, 12)) * 0.8).astype(np.float16).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    found = {}
    for level in ("DEFAULT", "AVX2"):
        arguments = [str(path), str(tmp_path / "x.npy"), str(tmp_path / f"{level}.npy")]
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": level}
        subprocess.run([sys.executable, "-c", QUANTISED, *arguments], check=True, env=environment)
        found[level] = np.load(tmp_path / f"{level}.npy")

    import torch

    levels = np.clip(np.rint(x / np.float32(0.02)), -128, 127)
    product = torch.nn.functional.conv2d(
        torch.from_numpy(levels).double(), torch.from_numpy(weight).double(), padding=1
    )
    wanted = product.numpy() * float(np.float32(0.02)) * float(np.float32(0.01))
    assert min(sqnr_db(wanted, one) for one in found.values()) > 60
    assert sqnr_db(found["DEFAULT"], found["AVX2"]) > 65


def test_what_only_moves_numbers_is_not_rounded_again() -> None:
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([1, 4], np.float32, name="x")
    moved = ops.reshape(x, ops.constant(np.array([4, 1])), False)
    model = openvino.Model([ops.result(ops.sigmoid(moved))], [x], "m")
    assert simulate_half_ir(model) == 2  # the input and the sigmoid
    assert kinds(model).count("RoundHalf") == 2 and RoundHalf is not None
