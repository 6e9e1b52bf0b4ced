from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import op_counts, remove_unused
from passes import run_passes
from passes.base import PassContext, PassResult
from passes.merge_experts import MergeExperts

FEEDS = {
    "x": np.random.default_rng(1).standard_normal((2, 5, 4)).astype(np.float32),
    "timestep": np.array([3.0], dtype=np.float32),
}
DENSE = {"LayerNormalization": 1, "MatMul": 2, "Add": 3, "Split": 1, "Gelu": 1, "Mul": 1}


def merge(graph: ir.Model) -> PassResult:
    return run_passes(graph, [MergeExperts()], PassContext())[0]


@pytest.mark.parametrize("affines", ["one", "each"])
@pytest.mark.parametrize("gates", [(1.0,), (0.25, 0.75), (0.1, 0.2, 0.3, 0.4), (0.125,) * 8])
def test_experts_become_one_dense_feed_forward(
    gates: tuple[float, ...], affines: str, mixture: Any, run_graph: Any, assert_close: Any
) -> None:
    graph = mixture(gates, affines=1 if affines == "one" else len(gates))
    expected = run_graph(graph, FEEDS)
    assert merge(graph).rewrites == 1
    assert op_counts(graph) == DENSE
    assert_close(run_graph(graph, FEEDS), expected, 1e-6)
    up = graph.graph.initializers["block.ff.net.0.proj.weight"]
    assert up.shape is not None and up.shape.numpy() == (4, 6 * len(gates))
    assert not merge(graph).changed


def test_a_wrong_gate_would_be_noticed(mixture: Any, run_graph: Any, assert_close: Any) -> None:
    expected = run_graph(mixture((0.25, 0.75)), FEEDS)
    graph = mixture((0.251, 0.749))
    merge(graph)
    with pytest.raises(AssertionError, match="differs"):
        assert_close(run_graph(graph, FEEDS), expected)


def test_the_arithmetic_is_rounded_once(mixture: Any) -> None:
    graph = mixture((0.3, 0.7))
    weights = {name: value.const_value.numpy().astype(np.float64) for name, value in graph.graph.initializers.items()}
    merge(graph)
    merged = graph.graph.initializers["block.ff.net.0.proj.bias"].const_value
    assert merged is not None
    biases = [weights["beta_0"].reshape(-1) @ weights[f"up_{i}"] + weights[f"up_bias_{i}"] for i in (0, 1)]
    exact = np.concatenate([b[:3] for b in biases] + [b[3:] for b in biases])
    np.testing.assert_array_equal(merged.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize("missing", ["up_bias", "down_bias", "affine"])
def test_biases_and_affines_may_be_missing(missing: str, mixture: Any, run_graph: Any, assert_close: Any) -> None:
    graph = mixture((0.25, 0.75))
    skip = {"up_bias": ("p_0", "u_0"), "down_bias": ("e_1", "d_1"), "affine": ("normed_0", "norm")}[missing]
    values = {v.name: v for node in graph.graph for v in node.outputs}
    ir.convenience.replace_all_uses_with(values[skip[0]], values[skip[1]])
    remove_unused(graph)
    expected = run_graph(graph, FEEDS)
    assert merge(graph).rewrites == 1
    assert_close(run_graph(graph, FEEDS), expected, 1e-6)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("gate", "a gate is not constant"),
        ("channels", "a gate differs between channels or tokens"),
        ("gelu", "the experts have different activations"),
        ("inputs", "the experts read different values"),
    ],
)
def test_what_cannot_be_merged_stays_and_is_reported(change: str, reason: str, mixture: Any) -> None:
    graph = mixture(gate="Sigmoid(timestep)") if change == "gate" else mixture((0.25, 0.75))
    nodes = {node.outputs[0].name: node for node in graph.graph}
    if change == "channels":
        gates = ir.tensor(np.linspace(0, 1, 4, dtype=np.float32), name="gates")
        value = ir.Value(name="gates", shape=gates.shape, type=ir.TensorType(gates.dtype), const_value=gates)
        graph.graph.register_initializer(value)
        nodes["w_1"].replace_input_with(1, value)
    elif change == "gelu":
        nodes["a_1"].attributes["approximate"] = ir.AttrString("approximate", "tanh")
    elif change == "inputs":
        nodes["u_1"].replace_input_with(0, graph.graph.inputs[0])
    before = op_counts(graph)
    result = merge(graph)
    assert [(s.node, s.reason) for s in result.skipped] == [("block.ff", reason)]
    assert not result.changed and op_counts(graph) == before


def test_a_feed_forward_without_a_gate_is_not_an_expert(mixture: Any) -> None:
    graph = mixture((1.0,))
    merge(graph)
    result = merge(graph)
    assert not result.changed and not result.skipped


def test_an_expert_whose_hidden_value_is_read_elsewhere_stays(mixture: Any) -> None:
    graph = mixture((0.25, 0.75))
    hidden = next(v for node in graph.graph for v in node.outputs if v.name == "h_0")
    hidden.type, hidden.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", "L", 3])
    graph.graph.outputs.append(hidden)
    merge(graph)
    assert op_counts(graph)["Gelu"] == 2


def test_an_unbound_graph_is_refused(micro: Path) -> None:
    with pytest.raises(PassError, match="'task_ids'"):
        merge(graph_io.load(micro))
