from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import op_counts
from passes import run_passes
from passes.base import PassContext
from passes.freeze_shapes import FreezeShapes

SIZES = PassContext(batch=2, height=8, width=4, text_length=5)
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
