"""What a Q/DQ graph is asked, and relieved of, apart from any target."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from mtu_compile.core.errors import PassError
from mtu_compile.graph import qdq
from mtu_compile.graph.sessions import open_as_written

#: One quantiser behind which everything is moved about; ``{w}`` is the weight the convolution reads.
GRAPH = """<ir_version: 10, opset_import: ["" : 20]>
agraph (float[1, 4, 3, 3] x) => (float[1, 4, 6, 6] y) {{
    q = QuantizeLinear(x, s, zero)
    u = DequantizeLinear(q, s, zero)
    k = DequantizeLinear(w8, s, zero)
    r = Resize<mode = "nearest">(u, , scales)
    y = Conv(r, {weight})
}}"""


def graph(weight: str) -> ir.Model:
    model = ir.from_onnx_text(GRAPH.format(weight=weight))
    constants = {
        "s": np.float32(0.03),
        "zero": np.int8(0),
        "w8": np.ones((4, 4, 1, 1), np.int8),
        "w": np.ones((4, 4, 1, 1), np.float32),
        "scales": np.array([1, 1, 2, 2], np.float32),
    }
    known = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for name, array in constants.items():
        if name in known:
            tensor = ir.tensor(np.asarray(array), name=name)
            known[name].const_value, known[name].type = tensor, ir.TensorType(tensor.dtype)
            known[name].shape = ir.Shape(np.asarray(array).shape)
            model.graph.register_initializer(known[name])
    return model


@pytest.mark.parametrize(("weight", "dropped", "left"), [("w", 1, 0), ("k", 0, 1)])
def test_quantisers_that_no_quantised_layer_reads_are_dropped(weight: str, dropped: int, left: int) -> None:
    model = graph(weight)
    assert qdq.drop_idle(model) == dropped
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == left
    resize = next(node for node in model.graph if node.op_type == "Resize")
    assert resize.inputs[0] is not None and resize.inputs[0].name == ("x" if dropped else "u")
    assert qdq.drop_idle(model) == 0


def unsigned_graph(zero: int = 0) -> onnx.ModelProto:
    """x [4] → uint8 Q/DQ → y, scale 0.01."""
    values = {"s": np.array(0.01, np.float32), "z": np.array(zero, np.uint8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="dq"),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    initializers = [numpy_helper.from_array(value, name) for name, value in values.items()]
    kept = [helper.make_tensor_value_info("q", TensorProto.UINT8, [4])]
    graph = helper.make_graph(nodes, "u", info[:1], info[1:], initializers, value_info=kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_unsigned_activations_become_signed_of_the_same_range(tmp_path):
    import onnxruntime

    signed = ir.from_proto(unsigned_graph())
    assert qdq.sign_activations(signed) == 1
    model = ir.to_proto(signed)
    onnx.checker.check_model(model, full_check=True)
    feed = np.array([0, 1.0, 2.55, 9.0], np.float32)
    (values,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": feed})
    assert np.allclose(values, [0, 1.0, 2.55, 2.55], atol=0.5 * 2.55 / 127 + 1e-6)
    assert qdq.sign_activations(signed) == 0


def test_an_asymmetric_quantiser_is_not_turned_signed():
    with pytest.raises(PassError, match="asymmetric"):
        qdq.sign_activations(ir.from_proto(unsigned_graph(zero=7)))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -2, None])
def test_folded_weights_are_what_the_runtime_dequantises(axis: int | None, half: bool) -> None:
    rng, dtype = np.random.default_rng(0), np.float16 if half else np.float32
    each = (6,) if axis == 0 else (4,)
    scale = rng.uniform(0.001, 0.1, () if axis is None else each).astype(dtype)
    values = {
        "w8": rng.integers(-128, 128, (6, 4, 3), dtype=np.int8),
        "s": scale,
        "z": rng.integers(-5, 5, scale.shape, dtype=np.int8),
    }
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("DequantizeLinear", ["w8", "s", "z"], ["w"], **attributes),
        helper.make_node("Identity", ["w"], ["y"]),
    ]
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    body = helper.make_graph(
        nodes,
        "g",
        [],
        [helper.make_tensor_value_info("y", kind, [6, 4, 3])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in values.items()],
    )
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    model = ir.from_proto(proto)
    assert qdq.fold_weights(model) == 1
    assert [node.op_type for node in model.graph] == ["Identity"]
    (wanted,) = open_as_written(proto.SerializeToString()).run(None, {})
    (folded,) = open_as_written(ir.to_proto(model).SerializeToString()).run(None, {})
    assert folded.dtype == wanted.dtype == dtype
    np.testing.assert_array_equal(folded, wanted)
    assert qdq.fold_weights(model) == 0
