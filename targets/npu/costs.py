"""Cost of every layer on an NPU, as its compiler estimates it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from targets.base import LayerCosts
from targets.costs.layers import Kernel, Layers, attribute
from targets.npu.report import Report
from targets.openvino.costs import link


def scheduled(model: Any, report: Report, layers: Layers, source: str) -> LayerCosts:
    """What the NPU's compiler estimated, by the parts of the latency its layers are answerable for.

    Args:
        model: the IR that was compiled; its operations have the names of the schedule.
        report: with the schedule.
    """
    operations = list(model.get_ordered_ops())
    kernels = link(operations, [layers.of([str(one.get_friendly_name())]) for one in operations])
    parts: dict[str, float] = {}
    fused: set[str] = set()
    for one in report.layers:
        parts[one.name] = parts.get(one.name, 0.0) + (one.dpu_us + one.shave_us + one.dma_us) / 1e3
        if one.type == "ScaledDotProductAttention":
            fused.add(one.name)
    kernels = [replace(k, layers=(*_product_before(kernels, k), *k.layers)) if k.name in fused else k for k in kernels]
    spent = [parts.pop(kernel.name, 0.0) for kernel in kernels]
    costs = attribute(kernels, spent, layers, source=source, measured=False)
    return replace(costs, total_ms=costs.total_ms + sum(parts.values()))


def _product_before(kernels: Sequence[Kernel], kernel: Kernel) -> tuple[str, ...]:
    """The query·key product of a fused attention, which is called by its product with value."""
    while kernel.reads:
        kernel = kernels[kernel.reads[0]]
        if kernel.layers:
            return kernel.layers
    return ()
