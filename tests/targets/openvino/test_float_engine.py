from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.accuracy.host.parity import backends
from mtu_compile.core.errors import TargetError
from mtu_compile.runtime.engine import open_engine
from targets.openvino.float_engine import multiply_in_float

CONFIG = {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32"}


def write_quantised(path: Path) -> Path:
    """Two quantised layers, the second with one scale for all channels, that overflow 16 bits and reach both ends."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    values = {
        "s": np.float32(0.03),
        "zero": np.int8(0),
        "w": rng.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8),
        "sw": rng.uniform(1e-4, 2e-4, 16).astype(np.float32),
        "zeros": np.zeros(16, np.int8),
        "w2": rng.integers(-127, 128, (16, 8)).astype(np.int8),
        "sw2": np.float32(1e-3),
        "order": np.array([0], np.int64),
    }
    make = helper.make_node
    nodes = [
        make("QuantizeLinear", ["x", "s", "zero"], ["q"]),
        make("DequantizeLinear", ["q", "s", "zero"], ["u"]),
        make("DequantizeLinear", ["w", "sw", "zeros"], ["k"], axis=0),
        make("Conv", ["u", "k"], ["c"], pads=[1, 1, 1, 1]),
        make("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]),
        make("QuantizeLinear", ["t", "s", "zero"], ["q2"]),
        make("DequantizeLinear", ["q2", "s", "zero"], ["u2"]),
        make("DequantizeLinear", ["w2", "sw2", "zero"], ["k2"]),
        make("MatMul", ["u2", "k2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 8, 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


@pytest.mark.int8
def test_signed_layers_are_exact_on_every_cpu(tmp_path: Path) -> None:
    path = write_quantised(tmp_path / "model.onnx")
    feed = {"x": np.random.default_rng(1).standard_normal((1, 16, 8, 8)).astype(np.float32) * 2}
    exact = open_engine("onnxruntime", path, {})(feed)["y"]
    assert sqnr_db(exact, open_engine("openvino-float", path, CONFIG)(feed)["y"]) > 60


def test_what_cannot_be_computed_here_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2,304 and 128 weights, which are held three times in four bytes, make 29 kB; INT8 kernels take no part of it."""
    path = write_quantised(tmp_path / "model.onnx")
    monkeypatch.setattr("targets.openvino.float_engine.host_memory", lambda: 29_000)
    with pytest.raises(TargetError, match=r"model.onnx takes about 29\.\d kB.*this machine has 29\.0 kB"):
        open_engine("openvino-float", path, CONFIG)
    open_engine("openvino", path, CONFIG)
    (offered,) = [one for one in backends(path) if one.name.startswith("OpenVINO")]
    with pytest.raises(TargetError):
        offered.open()
    monkeypatch.setattr("targets.openvino.float_engine.host_memory", lambda: None)
    open_engine("openvino-float", path, CONFIG)


def test_no_integers_are_left(tmp_path: Path) -> None:
    import openvino

    model: Any = openvino.Core().read_model(str(write_quantised(tmp_path / "model.onnx")))
    assert multiply_in_float(model)
    types = {str(op.get_element_type().get_type_name()) for op in model.get_ordered_ops() if op.get_output_size()}
    assert not types & {"i8", "u8"}
    assert multiply_in_float(model) == 0
