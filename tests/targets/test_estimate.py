from __future__ import annotations

import pytest

from mtu_compile.core.errors import ModelError
from targets.estimate import estimate


def test_weights_and_peak_are_those_of_the_graph(unet_like):
    floats = 16 + 32 * 8 + 8 * 4 * 9 + 8 + 4 * 8
    integers = 4  # batch, axis and the two axes, int64
    plan = estimate(unet_like, precision="fp32", device_bytes=10**6)
    assert plan.weights_bytes == 4 * floats + 8 * integers
    # The Add holds hidden, mixed [2, 8, 8, 8] and time [2, 8, 1, 1] at once; the sample is used up by then.
    assert plan.activation_bytes == 4 * (2 * 2 * 8 * 64 + 16)
    assert plan.unknown_shapes == 0
    assert plan.fits
    half = estimate(unet_like, precision="bf16", device_bytes=None)
    assert half.weights_bytes == 2 * floats + 8 * integers
    assert half.activation_bytes == plan.activation_bytes // 2


def test_integer_weights_count_as_one_byte(tmp_path):
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "s"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 100])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 100])],
        [
            numpy_helper.from_array(np.zeros((100, 100), np.int8), "w8"),
            numpy_helper.from_array(np.array(1, np.float32), "s"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), str(tmp_path / "q.onnx"))
    assert estimate(tmp_path / "q.onnx", precision="int8", device_bytes=None).weights_bytes == 10_000 + 2


def test_unreadable_graphs_are_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"\x00not a graph\xff" * 10)
    with pytest.raises(ModelError, match="is not an ONNX file"):
        estimate(tmp_path / "bad.onnx", precision="fp32", device_bytes=None)
    with pytest.raises(ModelError, match="there is no ONNX file"):
        estimate(tmp_path / "none.onnx", precision="fp32", device_bytes=None)


def test_weights_outside_the_graphs_folder_are_refused(unet_like, tmp_path):
    import onnx

    model = onnx.load(str(unet_like))
    path = tmp_path / "external.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="weights", size_threshold=64)
    assert estimate(path, precision="fp32", device_bytes=None) == estimate(
        unet_like, precision="fp32", device_bytes=None
    )
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        estimate(path, precision="fp32", device_bytes=None)
