"""Finds the input convolution of a multi-task UNet: each task reads its own channels through weights of its own."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import SAMPLE, attribute, produced_by
from passes.constants import Evaluator


@dataclass(frozen=True)
class Slot:
    """One task's channels of the sample, which a gate lets through for that task alone.

    Attributes:
        channels: how many of the first channels the task reads.
        part: the sample, or its first channels.
        gate: 1 for the task, else 0.
    """

    channels: int
    part: ir.Value
    gate: ir.Value


@dataclass(frozen=True)
class RoutedConv:
    """The convolution over all slots, side by side."""

    conv: ir.Node
    slots: tuple[Slot, ...]


def find_routed_conv(graph: ir.Model, sample: ir.Value, evaluator: Evaluator) -> RoutedConv:
    """The routed convolution that reads ``sample``; ``PassError`` if there is none. The task has to be bound."""
    for node in graph.graph:
        if node.op_type != "Conv" or not evaluator.is_constant(node.inputs[1]):
            continue
        concat = produced_by(node.inputs[0], "Concat")
        parts = (node.inputs[0],) if concat is None else tuple(concat.inputs)
        if concat is not None and attribute(concat, "axis", None) not in (1, -3):
            continue
        slots = [_match_slot(part, sample, evaluator) for part in parts]
        if all(slot is not None for slot in slots):
            return RoutedConv(node, tuple(slot for slot in slots if slot is not None))
    raise PassError(
        f"no routed input convolution reads {SAMPLE!r}",
        hint="the graph has to be exported by mtu_compile.model.export.export_unet",
    )


def _match_slot(value: ir.Value | None, sample: ir.Value, evaluator: Evaluator) -> Slot | None:
    """``value`` as the first channels of ``sample`` times a constant."""
    product = produced_by(value, "Mul")
    for index in (0, 1) if product is not None else ():
        assert product is not None
        part, gate = product.inputs[index], product.inputs[1 - index]
        channels = _first_channels(part, sample, evaluator)
        if channels is not None and part is not None and gate is not None and evaluator.is_constant(gate):
            return Slot(channels, part, gate)
    return None


def _first_channels(value: ir.Value | None, sample: ir.Value, evaluator: Evaluator) -> int | None:
    """How many of the first channels of ``sample`` the value is."""
    assert sample.shape is not None
    if value is sample:
        return int(sample.shape[1])  # type: ignore[arg-type]
    node = produced_by(value, "Slice")
    if node is None or node.inputs[0] is not sample:
        return None
    start, end, axis, step = (_number(v, evaluator) for v in [*node.inputs[1:], None, None][:4])
    if start != 0 or end is None or axis not in (1, -3) or step not in (1, None):
        return None
    return min(end, int(sample.shape[1]))  # type: ignore[arg-type]


def _number(value: ir.Value | None, evaluator: Evaluator) -> int | None:
    array = evaluator.array(value) if value is not None else None
    return int(array.item()) if array is not None and array.size == 1 else None
