from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import op_counts
from passes import run_passes
from passes.base import PassContext
from passes.freeze_shapes import FreezeShapes

SIZES = PassContext(batch=2, height=8, width=4, text_length=5)
FREE = PassContext(height=8, width=4, text_length=5)
FLATTEN = """agraph (float[batch, 3, height, width] sample) => (float[batch, N] y) {
    size = Shape<start = 0, end = 1>(sample)
    shape = Concat<axis = 0>(size, rest)
    y = Reshape(sample, shape)
}"""
REST = np.array([-1], dtype=np.int64)


def test_every_value_has_a_static_shape(micro: Path, random_feeds: Any, run_graph: Any, assert_close: Any) -> None:
    graph = graph_io.load(micro)
    assert op_counts(graph)["Shape"]
    (result,) = run_passes(graph, [FreezeShapes()], SIZES)
    assert result.changed and not op_counts(graph)["Shape"]
    values = [*graph.graph.inputs, *(v for node in graph.graph for v in node.outputs)]
    assert all(v.shape is not None and v.shape.is_static() for v in values)
    feeds = random_feeds(micro, 2, 9, 8, 4) | {"task_ids": np.array([3, 1])}
    assert_close(run_graph(graph, feeds), run_graph(micro, feeds))
    assert not run_passes(graph, [FreezeShapes()], SIZES)[0].changed


def test_the_batch_stays_free_where_none_is_given(
    micro: Path, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    graph = graph_io.load(micro)
    (result,) = run_passes(graph, [FreezeShapes()], FREE)
    counts = op_counts(graph)
    assert result.changed and not counts["Shape"] and not counts["Expand"]
    assert _sizes_not_static(graph) == {"batch"}
    for batch in (1, 2, 3):
        feeds = random_feeds(micro, batch, 9, 8, 4) | {"task_ids": np.array([3, 1, 0][:batch])}
        assert_close(run_graph(graph, feeds), run_graph(micro, feeds))
    assert not run_passes(graph, [FreezeShapes()], FREE)[0].changed


def test_a_free_batch_is_frozen_later(micro: Path, random_feeds: Any, run_graph: Any, assert_close: Any) -> None:
    graph = graph_io.load(micro)
    run_passes(graph, [FreezeShapes()], FREE)
    (result,) = run_passes(graph, [FreezeShapes()], PassContext(batch=1))
    assert result.changed and not _sizes_not_static(graph)
    feeds = random_feeds(micro, 1, 9, 8, 4) | {"task_ids": np.array([3])}
    assert_close(run_graph(graph, feeds), run_graph(micro, feeds))


def test_a_quantised_graph_is_frozen_and_keeps_its_quantisers(parse: Any, run_graph: Any) -> None:
    graph = parse(
        """agraph (float[batch, 4] x) => (float[batch, 2, 2] y) {
            q = QuantizeLinear(x, scale, zero)
            d = DequantizeLinear(q, scale, zero)
            w = DequantizeLinear(weight, scale, zero)
            m = MatMul(d, w)
            y = Reshape(m, shape)
        }""",
        scale=np.float32(0.5),
        zero=np.int8(0),
        weight=np.eye(4, dtype=np.int8),
        shape=np.array([0, 2, 2]),
    )
    before = op_counts(graph)
    run_passes(graph, [FreezeShapes()], PassContext(batch=3))
    assert op_counts(graph) == before and not _sizes_not_static(graph)
    feeds = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    np.testing.assert_array_equal(run_graph(graph, feeds)["y"].reshape(3, 4), feeds["x"] / 2)


def test_heads_are_transposed_without_being_merged_with_the_batch(parse: Any, run_graph: Any) -> None:
    graph = parse(
        """agraph (float[batch, 4, 5, 6] sample) => (float[batch, 4, 6, 5] y) {
            merged = Reshape(sample, heads)
            turned = Transpose<perm = [0, 2, 1]>(merged)
            size = Shape<start = 0, end = 2>(sample)
            shape = Concat<axis = 0>(size, rest)
            y = Reshape(turned, shape)
        }""",
        heads=np.array([-1, 5, 6]),
        rest=np.array([6, 5]),
    )
    run_passes(graph, [FreezeShapes()], FREE)
    assert op_counts(graph) == {"Transpose": 1} and _sizes_not_static(graph) == {"batch"}
    sample = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(run_graph(graph, {"sample": sample})["y"], sample.swapaxes(2, 3))


@pytest.mark.parametrize(
    "body",
    [
        "size = Shape<start = 0, end = 1>(x) number = Cast<to = 1>(size) y = Mul(x, number)",
        "size = Shape<start = 0, end = 1>(x) y = Tile(x, size)",
    ],
)
def test_a_node_that_computes_with_the_batch_is_refused_where_it_is_free(parse: Any, body: str) -> None:
    text = body.replace(") ", ")\n")
    graph = parse(f"agraph (float[batch] x) => (float[n] y) {{ {text} }}")
    with pytest.raises(PassError, match=r"(Mul|Tile)_\d+"):
        run_passes(graph, [FreezeShapes()], FREE)


def _sizes_not_static(graph: ir.Model) -> set[str]:
    values = [*graph.graph.inputs, *graph.graph.outputs, *(v for node in graph.graph for v in node.outputs)]
    assert all(value.shape is not None for value in values)
    return {str(size) for value in values for size in value.shape or () if not isinstance(size, int)}


def test_shape_computations_are_folded(parse: Any) -> None:
    graph = parse(FLATTEN, rest=REST)
    run_passes(graph, [FreezeShapes()], SIZES)
    assert op_counts(graph) == {"Reshape": 1}
    assert graph.graph.outputs[0].shape.numpy() == (2, 96)


def test_a_dimension_without_a_size_is_refused(parse: Any) -> None:
    with pytest.raises(PassError, match="no size is given for dimension 'height' of input 'sample'"):
        run_passes(parse(FLATTEN, rest=REST), [FreezeShapes()], PassContext(batch=2, width=4))
    other = parse("agraph (float[frames] x) => (float[frames] y) { y = Relu(x) }")
    with pytest.raises(PassError, match="no size is given for dimension 'frames' of input 'x'"):
        run_passes(other, [FreezeShapes()], SIZES)


def test_a_size_that_contradicts_a_static_dimension_is_refused(micro: Path) -> None:
    with pytest.raises(PassError, match="'encoder_hidden_states' cannot have size 7 in dimension 1: it is 5"):
        run_passes(graph_io.load(micro), [FreezeShapes()], PassContext(batch=2, height=8, width=4, text_length=7))


def test_an_output_of_another_size_than_promised_is_refused(parse: Any) -> None:
    graph = parse(
        """agraph (float[batch, 3, height, width] sample) => (float[batch, 3, height, width] y) {
            y = MaxPool<kernel_shape = [2, 2]>(sample)
        }"""
    )
    with pytest.raises(PassError, match="output 'y' has size 7 in dimension 2, not 8"):
        run_passes(graph, [FreezeShapes()], SIZES)


def test_a_size_that_depends_on_the_data_is_refused(parse: Any) -> None:
    graph = parse("agraph (float[batch, 4] x) => (int64[2, N] y) { y = NonZero(x) }")
    with pytest.raises(PassError, match="1 values have no static shape, the first is 'y'"):
        run_passes(graph, [FreezeShapes()], SIZES)
