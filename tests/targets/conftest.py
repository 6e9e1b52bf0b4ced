"""Small static ONNX graphs that stand for a UNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def write_unet_like(path: Path, *, scale: float = 1.0, batch: int = 2) -> Path:
    """conv(sample) + gemm(sinusoidal embedding of timestep) → ``out_sample``; the anatomy diffusers exports.

    Inputs ``sample`` f32 [batch, 4, 8, 8] and ``timestep`` f32 [1]; ``scale`` multiplies the last weights.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    half = 16
    values = {
        "batch": np.array([batch], np.int64),
        "axis": np.array([1], np.int64),
        "axes": np.array([2, 3], np.int64),
        "freqs": np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)[None],
        "w_time": (rng.standard_normal((2 * half, 8)) * 0.3).astype(np.float32),
        "w_in": (rng.standard_normal((8, 4, 3, 3)) * 0.1).astype(np.float32),
        "b_in": (rng.standard_normal(8) * 0.1).astype(np.float32),
        "w_out": (rng.standard_normal((4, 8, 1, 1)) * 0.3 * scale).astype(np.float32),
    }
    nodes = [
        helper.make_node("Expand", ["timestep", "batch"], ["t"], name="expand"),
        helper.make_node("Unsqueeze", ["t", "axis"], ["t1"], name="unsqueeze"),
        helper.make_node("Mul", ["t1", "freqs"], ["angle"], name="angle"),
        helper.make_node("Sin", ["angle"], ["sin"], name="sin"),
        helper.make_node("Cos", ["angle"], ["cos"], name="cos"),
        helper.make_node("Concat", ["cos", "sin"], ["embedding"], name="concat", axis=1),
        helper.make_node("MatMul", ["embedding", "w_time"], ["time"], name="time"),
        helper.make_node("Unsqueeze", ["time", "axes"], ["time4"], name="unsqueeze_time"),
        helper.make_node("Conv", ["sample", "w_in", "b_in"], ["hidden"], name="conv_in", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["hidden", "time4"], ["mixed"], name="add"),
        helper.make_node("Conv", ["mixed", "w_out"], ["out_sample"], name="conv_out"),
    ]
    graph = helper.make_graph(
        nodes,
        "unet_like",
        [
            helper.make_tensor_value_info("sample", TensorProto.FLOAT, [batch, 4, 8, 8]),
            helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
        ],
        [helper.make_tensor_value_info("out_sample", TensorProto.FLOAT, [batch, 4, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


def run_reference(path: Path, feed: dict[str, Any]) -> np.ndarray:
    """The graph's first output by ONNX Runtime, float32, its own optimisations disabled."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options).run(None, feed)[0]


@pytest.fixture
def unet_like(tmp_path: Path) -> Path:
    return write_unet_like(tmp_path / "graphs" / "unet.onnx")


@pytest.fixture
def feeds() -> list[dict[str, Any]]:
    """UNet-like inputs along a schedule, first timestep 999."""
    rng = np.random.default_rng(1)
    return [
        {"sample": rng.standard_normal((2, 4, 8, 8), dtype=np.float32), "timestep": np.array([t], np.float32)}
        for t in (999, 777, 333, 1)
    ]


@pytest.fixture
def native_bf16() -> bool:
    """Whether this machine's CPU computes in bf16; what is asked of it differs."""
    from targets.openvino.cpu import CpuTarget

    return "BF16" in CpuTarget()._capabilities()


@pytest.fixture(name="write_unet_like")
def write_unet_like_fixture() -> Any:
    return write_unet_like


@pytest.fixture(name="run_reference")
def run_reference_fixture() -> Any:
    return run_reference
