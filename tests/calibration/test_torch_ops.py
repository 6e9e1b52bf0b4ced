"""Every operation that torch runs in place of ONNX Runtime gives what ONNX Runtime gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from calibration import torch_ops

RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("f4")


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


X = floats(2, 6, 4, 5)
HALF = np.array(0.5, "f4")
MAYBE = floats(2, 6, 4, 5) > 0
PER_CHANNEL = np.abs(floats(6)) / 50
QUANTISED = RNG.integers(-127, 128, (2, 6, 4, 5)).astype("i1")

CASES: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "Add": ("Add", [X, floats(5)], {}),
    "And": ("And", [MAYBE, ~MAYBE[:1]], {}),
    "Cast to int64": ("Cast", [X * 3], {"to": TensorProto.INT64}),
    "Cast to float": ("Cast", [MAYBE], {"to": TensorProto.FLOAT}),
    "Clip": ("Clip", [X, np.array(-0.5, "f4"), HALF], {}),
    "Clip above only": ("Clip", [X, None, HALF], {}),
    "Concat": ("Concat", [X, X[:, :2]], {"axis": 1}),
    "Conv": ("Conv", [X, floats(8, 6, 3, 3), floats(8)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    "Conv in groups": ("Conv", [X, floats(6, 2, 2, 2)], {"group": 3, "dilations": [2, 2]}),
    "Conv padded unevenly": ("Conv", [X, floats(3, 6, 3, 3)], {"pads": [0, 1, 1, 2]}),
    "Conv of one dimension": ("Conv", [X[:, :, 0], floats(3, 6, 2)], {}),
    "Cos": ("Cos", [X], {}),
    "DequantizeLinear": ("DequantizeLinear", [QUANTISED, HALF, np.array(3, "i1")], {}),
    "DequantizeLinear per channel": ("DequantizeLinear", [QUANTISED, PER_CHANNEL, np.zeros(6, "i1")], {"axis": 1}),
    "Div": ("Div", [X, floats(4, 1)], {}),
    "Div of integers": ("Div", [ints(7, -7, 9), ints(2, 2, -4)], {}),
    "Equal": ("Equal", [ints(1, 2), ints(1, 3)], {}),
    "Erf": ("Erf", [X], {}),
    "Exp": ("Exp", [X], {}),
    "Expand": ("Expand", [X[:, :, :1], ints(6, 4, 1)], {}),
    "Flatten": ("Flatten", [X], {"axis": 2}),
    "Gather": ("Gather", [X, np.array([[0, -1], [2, 1]])], {"axis": 2}),
    "Gather one": ("Gather", [X, np.array(1)], {}),
    "Gelu": ("Gelu", [X], {}),
    "Gelu by tanh": ("Gelu", [X], {"approximate": "tanh"}),
    "Gemm": ("Gemm", [floats(3, 6), floats(5, 6), floats(5)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "Gemm turned": ("Gemm", [floats(6, 3), floats(6, 5)], {"transA": 1}),
    "Greater": ("Greater", [X, HALF], {}),
    "Identity": ("Identity", [X], {}),
    "InstanceNormalization": ("InstanceNormalization", [X, floats(6), floats(6)], {"epsilon": 1e-3}),
    "LayerNormalization": ("LayerNormalization", [X, floats(5), floats(5)], {"epsilon": 1e-3}),
    "LayerNormalization of two axes": ("LayerNormalization", [X, floats(4, 5)], {"axis": 2}),
    "LayerNormalization broadcast": ("LayerNormalization", [X, floats(1)], {"axis": 3}),
    "Less": ("Less", [X, HALF], {}),
    "MatMul": ("MatMul", [X, floats(5, 3)], {}),
    "Mul": ("Mul", [X, floats(6, 1, 1)], {}),
    "Neg": ("Neg", [X], {}),
    "Not": ("Not", [MAYBE], {}),
    "Pow": ("Pow", [np.abs(X), HALF], {}),
    "QuantizeLinear": ("QuantizeLinear", [X * 9, np.array(0.01, "f4"), np.array(0, "i1")], {}),
    "QuantizeLinear unsigned": ("QuantizeLinear", [X, np.array(0.02, "f4"), np.array(128, "u1")], {}),
    "QuantizeLinear halves": ("QuantizeLinear", [np.arange(-6, 6, dtype="f4") / 2, np.array(1, "f4")], {}),
    "Reciprocal": ("Reciprocal", [X + 9], {}),
    "ReduceMean": ("ReduceMean", [X, ints(2, -1)], {"keepdims": 0}),
    "ReduceMean of all": ("ReduceMean", [X], {}),
    "ReduceSum": ("ReduceSum", [X, ints(1)], {}),
    "Relu": ("Relu", [X], {}),
    "Reshape": ("Reshape", [X, ints(0, -1, 10)], {}),
    "Resize": (
        "Resize",
        [X, None, np.array([1, 1, 2, 2], "f4")],
        {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "Resize to a size": ("Resize", [X, None, None, ints(2, 6, 7, 3)], {}),
    "Shape": ("Shape", [X], {"start": 1}),
    "Sigmoid": ("Sigmoid", [X], {}),
    "Sin": ("Sin", [X], {}),
    "Slice": ("Slice", [X, ints(1, -3), ints(99, -1), ints(1, 3)], {}),
    "Slice in steps": ("Slice", [X, ints(0, 4), ints(6, -99), ints(1, 3), ints(2, -2)], {}),
    "Softmax": ("Softmax", [X], {"axis": 1}),
    "Split": ("Split", [X], {"axis": 3, "num_outputs": 2}),
    "Split as told": ("Split", [X, ints(1, 5)], {"axis": 1}),
    "Sqrt": ("Sqrt", [np.abs(X)], {}),
    "Squeeze": ("Squeeze", [X[:, :1, :, :1], ints(1, -1)], {}),
    "Sub": ("Sub", [X, HALF], {}),
    "Tanh": ("Tanh", [X], {}),
    "Transpose": ("Transpose", [X], {"perm": [2, 0, 3, 1]}),
    "Transpose around": ("Transpose", [X], {}),
    "Unsqueeze": ("Unsqueeze", [X, ints(0, -1)], {}),
    "Where": ("Where", [MAYBE, X, HALF], {}),
}


def model_of(op_type: str, inputs: list[Any], attributes: dict[str, Any]) -> onnx.ModelProto:
    names = ["" if one is None else f"x{i}" for i, one in enumerate(inputs)]
    outputs = [f"y{i}" for i in range(2 if op_type == "Split" else 1)]
    node = helper.make_node(op_type, names, outputs, **attributes)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(one.dtype), one.shape)
        for name, one in zip(names, inputs, strict=True)
        if one is not None
    ]
    graph = helper.make_graph([node], "one", given, [onnx.ValueInfoProto(name=name) for name in outputs])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("name", CASES)
def test_torch_gives_what_onnx_runtime_gives(name: str) -> None:
    op_type, inputs, attributes = CASES[name]
    model = model_of(op_type, inputs, attributes)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    want = session.run(None, {f"x{i}": one for i, one in enumerate(inputs) if one is not None})
    operation = torch_ops.bind(next(iter(ir.from_proto(model).graph)))
    assert operation.differentiable
    have = operation([None if one is None else torch.from_numpy(np.array(one)) for one in inputs])
    assert len(have) == len(want)
    for theirs, ours in zip(want, have, strict=True):
        assert ours.numpy().dtype == theirs.dtype
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)


def test_every_operation_is_compared() -> None:
    assert {op_type for op_type, _, _ in CASES.values()} == set(torch_ops.OPERATIONS)


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [("Einsum", {"equation": "abcd->abcd"}), ("Resize", {"mode": "linear"}), ("Resize", {"mode": "cubic"})],
)
def test_what_is_not_known_is_not_guessed(op_type: str, attributes: dict[str, Any]) -> None:
    inputs = [X] if op_type == "Einsum" else [X, None, np.array([1, 1, 2, 2], "f4")]
    node = next(iter(ir.from_proto(model_of(op_type, inputs, attributes)).graph))
    assert not torch_ops.bind(node).differentiable
