from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mtu_compile.graph.edit import op_counts
from passes import run_passes
from passes.base import PassContext
from passes.simulate_half import simulate_half
from passes.to_half import ToHalf

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def rounded(array: Any, name: str) -> Any:
    return array.astype(HALF[name].numpy()).astype(np.float32)


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_every_result_is_rounded_once(name: str, level: str, parse: Any) -> None:
    w = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    graph = parse(
        """agraph (float[64] x) => (float[64] y) {
            a = Mul(x, w) b = Add(a, w) r = Reshape(b, shape) s = Sigmoid(r) y = Reshape(s, flat)
        }""",
        w=w,
        shape=np.array([8, 8], np.int64),
        flat=np.array([64], np.int64),
    )
    run_passes(graph, [ToHalf("test::all", HALF[name], {})], PassContext())
    assert simulate_half(graph) == 4  # input, product, sum, sigmoid: moving rounds nothing
    assert op_counts(graph)["Cast"] == 9  # each there and back, and the one to float32 at the end
    assert {v.dtype for v in graph.graph.initializers.values()} == {ir.DataType.FLOAT, ir.DataType.INT64}
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options, ["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    (found,) = session.run(None, {"x": x})
    wide = rounded(rounded(rounded(x, name) * rounded(w, name), name) + rounded(w, name), name)
    expected = 1 / (1 + np.exp(-wide.astype(np.float64)))
    step = 2.0 ** (-11 if name == "fp16" else -8)
    np.testing.assert_allclose(found, expected, rtol=step)
    np.testing.assert_array_equal(found, rounded(found, name))
    assert np.abs(found - expected).max() > step / 16  # it did round


def test_a_float_graph_stays(parse: Any) -> None:
    graph = parse("agraph (float[2] x) => (float[2] y) { y = Sigmoid(x) }")
    assert simulate_half(graph) == 0
    assert op_counts(graph) == {"Sigmoid": 1} and graph.opset_imports[""] == 20
