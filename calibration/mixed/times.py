"""What the layers of a graph whose batch is free cost: targets time static graphs."""

from __future__ import annotations

from pathlib import Path

import passes
from mtu_compile.graph.io import beside
from targets.base import COST_ROUNDS, Precision, Target
from targets.costs.layers import ComparedCosts, compare_costs


def compare_costs_at(
    target: Target,
    float_graph: Path,
    int8_graph: Path,
    *,
    batch: int,
    precision: Precision = "int8",
    rounds: int = COST_ROUNDS,
) -> ComparedCosts | None:
    """``targets.costs.layers.compare_costs`` of two graphs at ``batch`` samples.

    Args:
        batch: what their batch is frozen to, in copies that are gone afterwards: that of the engine, or, where an
            engine takes any, that of most calls (``MergedSet.batch``).

    Raises:
        PassError: the graphs cannot have this batch.
        Further errors are those of ``compare_costs``.
    """
    with beside(float_graph, "costs") as in_float, beside(int8_graph, "costs") as quantised:
        for graph, frozen in ((float_graph, in_float), (int8_graph, quantised)):
            passes.run_pipeline(graph, frozen, ("mtu::freeze-shapes",), passes.PassContext(batch=batch), reuse=True)
        return compare_costs(target, in_float, quantised, precision=precision, rounds=rounds)
