from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import find_input, op_counts, scope
from passes import run_passes
from passes.base import PassContext, PassResult
from passes.bind_task import BindTask
from passes.fold_routing import FoldRouting

EDIT = PassContext(task_id=1, channels=8)


def fold(graph: ir.Model) -> PassResult:
    return run_passes(graph, [FoldRouting()], EDIT)[0]


@pytest.fixture
def bound(micro: Path) -> ir.Model:
    graph = graph_io.load(micro)
    run_passes(graph, [BindTask()], EDIT)
    return graph


def feed_router(graph: ir.Model, *sources: ir.Value, through: str = "Mul", at: str = ".router.fc1/Gemm") -> str:
    """Let the first router read its embedding times something; returns the new node's name."""
    gemm = next(node for node in graph.graph if str(node.name).endswith(at))
    embedding = gemm.inputs[0]
    assert embedding is not None
    name = f"{scope(gemm)}/{through}"
    mixed = ir.node(through, [embedding, *sources], name=name)
    gemm.replace_input_with(0, mixed.outputs[0])
    graph.graph.insert_before(gemm, mixed)
    return name


def test_routers_become_constants(bound: ir.Model) -> None:
    before = op_counts(bound)
    result = fold(bound)
    after = op_counts(bound)
    blocks, experts = 3, 2
    assert result.rewrites == blocks * (experts + 2)  # the experts' gates, one gamma, one beta
    assert before["Softmax"] - after["Softmax"] == blocks
    assert before["Gemm"] - after["Gemm"] == 2 * blocks
    assert not {"Gather", "GatherND", "TopK", "GatherElements"} & after.keys()
    assert not [node.name for node in bound.graph if ".router" in str(node.name)]


def test_the_folded_graph_computes_the_same(
    bound: ir.Model, micro: Path, random_feeds: Any, run_graph: Any, assert_close: Any
) -> None:
    fold(bound)
    feeds = random_feeds(micro, 2, 8)
    expected = run_graph(
        micro,
        feeds | {"sample": np.pad(feeds["sample"], ((0, 0), (0, 1), (0, 0), (0, 0))), "task_ids": np.ones(2, int)},
    )
    assert_close(run_graph(bound, feeds), expected)


def test_a_folded_graph_is_left_alone(bound: ir.Model) -> None:
    fold(bound)
    again = fold(bound)
    assert not again.changed
    assert [s.reason for s in again.skipped] == ["no task is bound"]


def test_a_router_fed_by_the_timestep_is_refused_by_name(bound: ir.Model) -> None:
    timestep = find_input(bound, "timestep")
    assert timestep is not None
    name = feed_router(bound, timestep)
    with pytest.raises(PassError) as caught:
        fold(bound)
    assert caught.value.message == f"router node '{name}' depends on the timestep (value 'timestep')"
    assert caught.value.hint == "only routers fed by the task alone can be specialised"


def test_a_router_fed_by_the_hidden_state_is_refused_by_name(bound: ir.Model) -> None:
    norm = next(node for node in bound.graph if str(node.name).endswith("ff.norm/LayerNormalization"))
    mean = ir.node("ReduceMean", [norm.outputs[0]], attributes={"keepdims": 0}, name="pooling/ReduceMean")
    bound.graph.insert_after(norm, mean)
    mean.outputs[0].name = "pooled"
    name = feed_router(bound, mean.outputs[0])
    with pytest.raises(PassError) as caught:
        fold(bound)
    assert caught.value.message == f"router node '{name}' depends on the hidden state (value 'pooled')"


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("Sigmoid(timestep)", "router node 'Sigmoid_.*' depends on the timestep"),
        ("ReduceMean(x)", "router node 'ReduceMean_.*' depends on 'x'"),
    ],
)
def test_gates_of_other_exporters_are_refused_too(gate: str, message: str, mixture: Any) -> None:
    graph = mixture(gate=gate)
    with pytest.raises(PassError, match=message):
        fold(graph)


def test_a_task_id_mixed_with_run_time_values_is_refused(bound: ir.Model) -> None:
    timestep = find_input(bound, "timestep")
    gather = next(node for node in bound.graph if node.name == "task_embedding/Gather")
    steps = ir.node("Cast", [timestep], attributes={"to": 7}, name="steps/Cast")  # type: ignore[list-item]
    later = ir.node("Add", [gather.inputs[1], steps.outputs[0]], name="steps/Add")  # type: ignore[list-item]
    gather.replace_input_with(1, later.outputs[0])
    bound.graph.insert_before(gather, [steps, later])
    with pytest.raises(PassError, match=r"router node .* depends on the timestep|'steps/Add' mixes the task id"):
        fold(bound)


def test_an_unbound_graph_is_refused(micro: Path) -> None:
    with pytest.raises(PassError, match="'task_ids'"):
        fold(graph_io.load(micro))


def test_a_graph_without_experts_is_left_alone(parse: Any) -> None:
    graph = parse("agraph (float[2] x) => (float[2] y) { y = Softmax(x) }")
    assert not fold(graph).changed
