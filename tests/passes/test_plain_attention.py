"""Attention as compilers look for it: the same function, with less that moves."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtu_compile.graph.edit import op_counts
from passes import run_passes
from passes.base import PassContext
from passes.plain_attention import PlainAttention

#: Attention with four heads of three, as PyTorch's exporter writes it; ``{reads}`` may read more.
EXPORTED = """agraph (float[2, 5, 12] queries, float[2, 5, 12] keys) => (float[2, 4, 5, 5] y{output}) {{
    q0 = Reshape(queries, heads)
    q = Transpose<perm = [0, 2, 1, 3]>(q0)
    k0 = Reshape(keys, heads)
    k = Transpose<perm = [0, 2, 1, 3]>(k0)
    joined = Reshape(k, three)
    turned = Transpose<perm = [0, 2, 1]>(joined)
    k4 = Reshape(turned, four)
    qs = Mul(q, root)
    ks = Mul(k4, root)
    scores = MatMul(qs, ks)
    y = Softmax<axis = -1>(scores)
    {reads}
}}"""
SHAPES = {"heads": [2, 5, 4, 3], "three": [8, 5, 3], "four": [2, 4, 3, 5]}


def _graph(parse: Any, output: str = "", reads: str = "", root: object = 3**-0.25) -> Any:
    constants = {name: np.array(shape, np.int64) for name, shape in SHAPES.items()}
    graph = parse(EXPORTED.format(output=output, reads=reads), root=np.array(root, np.float32), **constants)
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(graph)
    return graph


def _feeds() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((2, 5, 12)).astype(np.float32) for name in ("queries", "keys")}


def test_keys_are_transposed_once_and_queries_alone_are_scaled(parse: Any, run_graph: Any, assert_close: Any) -> None:
    graph = _graph(parse)
    expected = run_graph(graph, _feeds())
    (result,) = run_passes(graph, [PlainAttention()], PassContext())
    assert result.changed
    assert op_counts(graph) == {"Reshape": 2, "Transpose": 2, "Mul": 1, "MatMul": 1, "Softmax": 1}
    assert sorted(tuple(n.attributes["perm"].as_ints()) for n in graph.graph if n.op_type == "Transpose") == [
        (0, 2, 1, 3),
        (0, 2, 3, 1),
    ]
    assert_close(run_graph(graph, _feeds()), expected, 1e-6)
    assert not run_passes(graph, [PlainAttention()], PassContext())[0].changed


def test_what_others_read_stays_as_it_is(parse: Any, run_graph: Any, assert_close: Any) -> None:
    for output, reads in (
        (", float[2, 4, 5, 3] other", "other = Relu(k)"),
        (", float[2, 4, 5, 3] other", "other = Relu(qs)"),
    ):
        graph = _graph(parse, output, reads)
        expected = run_graph(graph, _feeds())
        run_passes(graph, [PlainAttention()], PassContext())
        assert_close(run_graph(graph, _feeds()), expected, 1e-6)


def test_a_factor_for_each_head_is_not_taken_for_one(parse: Any, run_graph: Any, assert_close: Any) -> None:
    graph = _graph(parse, root=np.linspace(0.5, 1.5, 4).reshape(4, 1, 1))
    expected = run_graph(graph, _feeds())
    run_passes(graph, [PlainAttention()], PassContext())
    assert op_counts(graph)["Mul"] == 2
    assert_close(run_graph(graph, _feeds()), expected, 1e-6)


def test_scores_that_are_given_are_not_touched(parse: Any, run_graph: Any, assert_close: Any) -> None:
    graph = _graph(parse, ", float[2, 4, 5, 5] scores")
    expected = run_graph(graph, _feeds())
    run_passes(graph, [PlainAttention()], PassContext())
    assert op_counts(graph)["Mul"] == 2
    assert_close(run_graph(graph, _feeds()), expected, 1e-6)
