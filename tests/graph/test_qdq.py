"""What a Q/DQ graph is asked, and relieved of, apart from any target."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mtu_compile.graph import qdq

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
