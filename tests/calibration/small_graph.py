"""A small transformer-like graph, what runs it, and it quantised for real."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

C, H = 16, 4  # width and side; C·H·H elements a sample


def write_graph(path: Path, *, external: bool = False) -> Path:
    """conv → norm → self-attention → feed-forward with Relu → conv: the parts of a UNet block.

    Input ``x`` f32 [1, 4, 4, 4], output ``y`` of the same shape.
    """
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:] if len(shape) == 4 else shape[:1]))).astype("f4")

    values = {
        "w_in": weights(C, 4, 3, 3),
        "b_in": weights(C),
        "tokens": np.array([1, C, H * H], np.int64),
        "gamma": np.ones(C, np.float32),
        "beta": np.zeros(C, np.float32),
        "w_q": weights(C, C),
        "w_k": weights(C, C),
        "w_v": weights(C, C),
        "w_up": weights(C, 4 * C),
        "b_up": weights(4 * C),
        "w_down": weights(4 * C, C),
        "picture": np.array([1, C, H, H], np.int64),
        "w_out": weights(4, C, 1, 1),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w_in", "b_in"], ["c"], name="conv_in", pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["c", "tokens"], ["r"], name="to_tokens"),
        helper.make_node("Transpose", ["r"], ["t"], name="to_tokens_t", perm=[0, 2, 1]),
        helper.make_node("LayerNormalization", ["t", "gamma", "beta"], ["n"], name="norm"),
        helper.make_node("MatMul", ["n", "w_q"], ["q"], name="attn.q"),
        helper.make_node("MatMul", ["n", "w_k"], ["k"], name="attn.k"),
        helper.make_node("MatMul", ["n", "w_v"], ["v0"], name="attn.v"),
        helper.make_node("Transpose", ["k"], ["kt"], name="kt", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "kt"], ["qk"], name="attn.qk"),
        helper.make_node("Softmax", ["qk"], ["s"], name="softmax"),
        helper.make_node("Reshape", ["v0", "as_is"], ["v"], name="heads"),
        helper.make_node("MatMul", ["s", "v"], ["a"], name="attn.av"),
        helper.make_node("Add", ["a", "t"], ["res"], name="residual"),
        helper.make_node("MatMul", ["res", "w_up"], ["u0"], name="ff.up"),
        helper.make_node("Add", ["u0", "b_up"], ["u"], name="ff.bias"),
        helper.make_node("Relu", ["u"], ["act"], name="ff.act"),
        helper.make_node("MatMul", ["act", "w_down"], ["d"], name="ff.down"),
        helper.make_node("Transpose", ["d"], ["dt"], name="to_picture_t", perm=[0, 2, 1]),
        helper.make_node("Reshape", ["dt", "picture"], ["p"], name="to_picture"),
        helper.make_node("Conv", ["p", "w_out"], ["y"], name="conv_out"),
    ]
    values["as_is"] = np.array([1, H * H, C], np.int64)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, H, H]) for name in "xy"]
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "block", info[:1], info[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 256}
    onnx.save(model, str(path), **(options if external else {}))
    return path


def make_samples(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 4, H, H), dtype=np.float32)} for _ in range(count)]


def run_ort(path: Path, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options)
    return np.stack([session.run(None, sample)[0] for sample in samples])


def run_openvino(path: Path, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.stack([compiled(sample)[0] for sample in samples])


def decibels(reference: np.ndarray, candidate: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(reference**2) / np.sum((reference - candidate) ** 2)))


@dataclass(frozen=True)
class Quantised:
    source: Path
    path: Path
    report: Any
    progress: list[tuple[int, int]]
    printed: str


def write_free_batch(path: Path) -> Path:
    """The graph of ``write_graph`` for any number of samples."""
    model = onnx.load(str(write_graph(path)))
    for tensor in model.graph.initializer:
        if tensor.name in ("tokens", "picture", "as_is"):
            tensor.CopyFrom(numpy_helper.from_array(np.array([0, *numpy_helper.to_array(tensor)[1:]]), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, str(path))
    return path
