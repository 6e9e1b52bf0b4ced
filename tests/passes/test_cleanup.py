from __future__ import annotations

from typing import Any

import numpy as np

from mtu_compile.graph.edit import op_counts
from passes import run_passes
from passes.base import PassContext
from passes.cleanup import Cleanup


def test_what_does_nothing_goes(parse: Any, run_graph: Any, assert_close: Any) -> None:
    graph = parse(
        """agraph (float[4] x) => (float[4] y) {
            a = Identity(x)
            b = Sigmoid(a)
            c = Sigmoid(x)
            unused = Relu(x)
            two = Add(one, other_one)
            z = Mul(c, two)
            y = Add(b, z)
        }""",
        one=np.ones(1, dtype=np.float32),
        other_one=np.ones(1, dtype=np.float32),
        forgotten=np.ones(100, dtype=np.float32),
    )
    feeds = {"x": np.linspace(-1, 1, 4, dtype=np.float32)}
    expected = run_graph(graph, feeds)
    (result,) = run_passes(graph, [Cleanup()], PassContext())
    assert result.changed
    assert op_counts(graph) == {"Sigmoid": 1, "Mul": 1, "Add": 1}
    assert len(graph.graph.initializers) == 1
    assert_close(run_graph(graph, feeds), expected, 0.0)
    assert not run_passes(graph, [Cleanup()], PassContext())[0].changed


def test_weights_and_their_arithmetic_stay(parse: Any) -> None:
    weight = np.ones((100, 100), dtype=np.float32)
    graph = parse(
        "agraph (float[1, 100] x) => (float[1, 100] y) { t = Transpose(w) a = MatMul(x, t) y = MatMul(a, same) }",
        w=weight,
        same=weight,
    )
    run_passes(graph, [Cleanup()], PassContext())
    assert op_counts(graph) == {"Transpose": 1, "MatMul": 2}
    assert set(graph.graph.initializers) == {"w", "same"}


def test_unused_inputs_stay(parse: Any) -> None:
    graph = parse("agraph (float[4] x, float[4] unused) => (float[4] y) { y = Relu(x) }")
    run_passes(graph, [Cleanup()], PassContext())
    assert [v.name for v in graph.graph.inputs] == ["x", "unused"]
