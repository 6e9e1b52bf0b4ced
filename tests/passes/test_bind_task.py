from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import find_input, op_counts
from passes import run_passes
from passes.base import PassContext, PassResult
from passes.bind_task import BindTask

INPAINT = PassContext(task_id=3, channels=9)
EDIT = PassContext(task_id=1, channels=8)


def bind(graph: ir.Model, context: PassContext) -> PassResult:
    return run_passes(graph, [BindTask()], context)[0]


def test_the_task_is_bound_and_the_input_narrowed(micro: Path) -> None:
    graph = graph_io.load(micro)
    before = op_counts(graph)
    result = bind(graph, EDIT)
    assert result.rewrites == 2
    assert find_input(graph, "task_ids") is None
    sample = find_input(graph, "sample")
    assert sample is not None and sample.shape is not None and sample.shape[1] == 8
    after = op_counts(graph)
    assert after["Conv"] == before["Conv"] and after["MatMul"] == before["MatMul"] - 1  # the bias of the task
    conv = next(node for node in graph.graph if node.name == "conv_in/Conv")
    assert [list(v.shape.numpy()) for v in conv.inputs[1:] if v is not None and v.shape] == [[32, 8, 3, 3], [32]]


@pytest.mark.parametrize("context", [EDIT, INPAINT])
def test_the_bound_graph_computes_the_same(
    context: PassContext, micro: Path, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    graph = graph_io.load(micro)
    bind(graph, context)
    feeds = random_feeds(micro, 2, 9)
    expected = run_graph(micro, feeds | {"task_ids": np.full(2, context.task_id)})
    assert_close(run_graph(graph, feeds | {"sample": feeds["sample"][:, : context.channels]}), expected)


def test_a_bound_graph_is_left_alone(micro: Path) -> None:
    graph = graph_io.load(micro)
    bind(graph, EDIT)
    again = bind(graph, EDIT)
    assert not again.changed
    assert [(s.node, s.reason) for s in again.skipped] == [("task_ids", "the graph has no such input")]


def test_a_task_the_model_does_not_have_is_refused(micro: Path) -> None:
    with pytest.raises(PassError) as caught:
        bind(graph_io.load(micro), PassContext(task_id=4, channels=8))
    assert "does the model have a task with this id?" in str(caught.value.hint)


def test_channels_the_task_does_not_read_are_refused(micro: Path) -> None:
    with pytest.raises(PassError, match="the task reads 4 channels of 'sample', not 8"):
        bind(graph_io.load(micro), PassContext(task_id=0, channels=8))


def test_another_reader_of_the_sample_is_refused(micro: Path) -> None:
    graph = graph_io.load(micro)
    sample = find_input(graph, "sample")
    assert sample is not None
    mean = ir.node("ReduceMean", [sample], attributes={"keepdims": 0}, name="somewhere/ReduceMean")
    output = graph.graph.outputs[0]
    producer = output.producer()
    assert producer is not None
    first = producer.inputs[0]
    shifted = ir.node("Add", [first, mean.outputs[0]], name="somewhere/Add")  # type: ignore[list-item]
    producer.replace_input_with(0, shifted.outputs[0])
    graph.graph.insert_before(producer, [mean, shifted])
    with pytest.raises(PassError, match="'somewhere/ReduceMean' reads 'sample' too"):
        bind(graph, EDIT)


def test_a_graph_without_the_routed_convolution_is_refused(parse: Any) -> None:
    graph = parse("agraph (float[B, 4, 8, 8] sample, int64[B] task_ids) => (float[B, 4, 8, 8] y) { y = Relu(sample) }")
    with pytest.raises(PassError, match="no routed input convolution"):
        bind(graph, EDIT)


def test_a_gate_by_channel_is_refused(parse: Any) -> None:
    graph = parse(
        """agraph (float[B, 4, 8, 8] sample, int64[B] task_ids) => (float[B, 2, 8, 8] y) {
            gate = Gather(table, task_ids)
            slot = Mul(sample, gate)
            y = Conv(slot, weight)
        }""",
        table=np.ones((2, 4, 1, 1), dtype=np.float32),
        weight=np.ones((2, 4, 1, 1), dtype=np.float32),
    )
    with pytest.raises(PassError, match="gates its input by channel"):
        bind(graph, PassContext(task_id=0, channels=4))


def test_one_task_only_needs_no_concatenation(parse: Any, run_graph: Any, assert_close: Any) -> None:
    text = """agraph (float[B, 4, 2, 2] sample, int64[B] task_ids) => (float[B, 2, 2, 2] y) {
        gate = Gather(table, task_ids)
        slot = Mul(gate, sample)
        z = Conv(slot, weight, bias)
        extra = Gather(biases, task_ids)
        y = Add(extra, z)
    }"""
    generator = np.random.default_rng(0)
    weights = {
        "table": np.full((1, 1, 1, 1), 1.0, dtype=np.float32),
        "weight": generator.standard_normal((2, 4, 1, 1)).astype(np.float32),
        "bias": generator.standard_normal(2).astype(np.float32),
        "biases": generator.standard_normal((1, 2, 1, 1)).astype(np.float32),
    }
    sample = generator.standard_normal((3, 4, 2, 2)).astype(np.float32)
    expected = run_graph(parse(text, **weights), {"sample": sample, "task_ids": np.zeros(3, dtype=np.int64)})
    graph = parse(text, **weights)
    bind(graph, PassContext(task_id=0, channels=4))
    assert op_counts(graph) == {"Conv": 1}
    assert_close(run_graph(graph, {"sample": sample}), expected)


def test_the_batch_is_the_samples_where_the_exporter_asked_the_task_ids(
    micro: Path, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    """Two inputs have the batch's size, and the exporter may ask either; a bound task has size 1."""
    graph = graph_io.load(micro)
    expected = run_graph(micro, random_feeds(micro, 2, 9) | {"task_ids": np.full(2, 1)})
    task_ids, moved = find_input(graph, "task_ids"), 0
    for node in graph.graph:
        if node.op_type == "Shape" and node.inputs[0] is find_input(graph, "sample"):
            start = node.attributes["start"].as_int() if "start" in node.attributes else 0
            if start == 0:
                node.replace_input_with(0, task_ids)
                moved += 1
    if not moved:  # the exporter asked the task ids already
        moved = sum(node.op_type == "Shape" and node.inputs[0] is task_ids for node in graph.graph)
    assert moved
    bind(graph, EDIT)
    feeds = random_feeds(micro, 2, 9)
    assert_close(run_graph(graph, feeds | {"sample": feeds["sample"][:, :8]}), expected)
