"""What the layers of a graph whose batch is free cost: targets time static graphs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import passes
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
    with tempfile.TemporaryDirectory(dir=int8_graph.parent, prefix="mtu-costs-") as folder:
        frozen = []
        for name, graph in (("float", float_graph), ("int8", int8_graph)):
            frozen.append(Path(folder) / f"{name}.onnx")
            passes.run_pipeline(graph, frozen[-1], ("mtu::freeze-shapes",), passes.PassContext(batch=batch))
        return compare_costs(target, *frozen, precision=precision, rounds=rounds)
