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
from passes.drop_experts import DropExperts

FEEDS = {
    "x": np.random.default_rng(1).standard_normal((2, 5, 4)).astype(np.float32),
    "timestep": np.array([3.0], dtype=np.float32),
}


@pytest.mark.parametrize(
    ("gates", "dropped"),
    [((0.0, 0.4, 0.6), 1), ((0.4, 0.0, 0.6), 1), ((0.4, 0.6, 0.0), 1), ((0.0, 1.0, 0.0), 2), ((0.0, 0.0, 1.0), 2)],
)
def test_unused_experts_go(
    gates: tuple[float, ...], dropped: int, mixture: Any, run_graph: Any, assert_close: Any
) -> None:
    graph = mixture(gates)
    expected = run_graph(graph, FEEDS)
    before = op_counts(graph)
    (result,) = run_passes(graph, [DropExperts()], PassContext())
    assert result.rewrites == dropped
    assert before["MatMul"] - op_counts(graph)["MatMul"] == 2 * dropped
    assert_close(run_graph(graph, FEEDS), expected, 1e-6)
    assert not run_passes(graph, [DropExperts()], PassContext())[0].changed


def test_a_small_gate_stays(mixture: Any) -> None:
    assert not run_passes(mixture((1e-30, 1.0)), [DropExperts()], PassContext())[0].changed


def test_gates_that_are_all_zero_stay_and_are_reported(mixture: Any) -> None:
    (result,) = run_passes(mixture((0.0, 0.0)), [DropExperts()], PassContext())
    assert [(s.node, s.reason) for s in result.skipped] == [("block.ff", "every gate is zero")]
    assert not result.changed


def test_a_gate_that_is_not_constant_is_reported(mixture: Any) -> None:
    (result,) = run_passes(mixture(gate="Sigmoid(timestep)"), [DropExperts()], PassContext())
    assert [s.reason for s in result.skipped] == ["a gate is not constant"]


def test_other_multiplications_by_zero_stay(parse: Any) -> None:
    graph = parse(
        "agraph (float[2] x) => (float[2] y) { z = Mul(x, zero) y = Add(z, x) }", zero=np.zeros(2, dtype=np.float32)
    )
    assert not run_passes(graph, [DropExperts()], PassContext())[0].changed


def test_an_unbound_graph_is_refused(micro: Path) -> None:
    with pytest.raises(PassError, match="'task_ids'"):
        run_passes(graph_io.load(micro), [DropExperts()], PassContext())
