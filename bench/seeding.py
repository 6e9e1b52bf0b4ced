"""Defects that INT8 UNets are known to have, as edits of their Q/DQ graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mtu_compile.core.guidance import ROWS
from mtu_compile.core.tasks import Task
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq
from mtu_compile.graph.edit import SAMPLE, add_constant, find_input, replace_value

Array = NDArray[Any]

#: Rewrites a graph in place.
Edit = Callable[[ir.Model], None]

#: Where in the graph a single layer is spoilt, as a share of the quantised layers in graph order.
PLACES = {"early": 0.1, "middle": 0.5, "late": 0.9}


@dataclass(frozen=True)
class Defect:
    """Something wrong with a task's UNet.

    Attributes:
        name: what is wrong, in words.
        edit: spoils the Q/DQ graph; ``None`` leaves it as it is.
    """

    name: str
    edit: Edit | None = None


def defects(task: Task, others: Mapping[str, ir.Model] = MappingProxyType({}), channels: int = 4) -> list[Defect]:
    """Everything that can be wrong with a task's UNet; the first is nothing.

    Args:
        task: the task.
        others: by name, graphs of tasks to be taken for it.
        channels: of a latent.
    """
    found = [Defect("nothing")]
    for place, share in PLACES.items():
        found += [
            Defect(f"activation range / 8, {place} layer", rescale_activation(share, 1 / 8)),
            Defect(f"activation range × 16, {place} layer", rescale_activation(share, 16)),
            Defect(f"weights' output channels rotated, {place} layer", rotate_channels(share)),
            Defect(f"every other channel's weights × 1.5, {place} layer", rescale_channels(share, 1.5)),
        ]
    found += [Defect(f"weights of task {name}", take_weights(other)) for name, other in others.items()]
    if task.guided != "none":
        found += [Defect("prompt dropped", drop_prompt(task)), Defect("text delta halved", shrink_delta(task, 0.5))]
    if task.condition:
        found.append(Defect("condition dropped", overwrite(slice(channels, None), 0)))
    if "mask" in task.condition:
        at = mask_channel(task, channels)
        found += [
            Defect("mask saturated at half", clip_channel(at, 0.5)),
            Defect("mask all ones", overwrite(slice(at, at + 1), 1)),
        ]
    return found


def quantised_layers(graph: ir.Model) -> list[tuple[ir.Node, ir.Node, ir.Node]]:
    """Layers with INT8 inputs and weights, in graph order: (layer, its activation's quantiser, its weights')."""
    found = []
    for node in graph.graph:
        if node.op_type not in qdq.LAYERS:
            continue
        activation, weight = (value.producer() if value is not None else None for value in node.inputs[:2])
        if activation is None or weight is None or {activation.op_type, weight.op_type} != {"DequantizeLinear"}:
            continue
        quantiser = activation.inputs[0].producer() if activation.inputs[0] is not None else None
        if quantiser is not None and weight.inputs[0] is not None and weight.inputs[0].is_initializer():
            found.append((node, quantiser, weight))
    return found


def _layer(graph: ir.Model, share: float) -> tuple[ir.Node, ir.Node, ir.Node]:
    layers = quantised_layers(graph)
    return layers[min(round(share * len(layers)), len(layers) - 1)]


def rescale_activation(share: float, factor: float) -> Edit:
    """Make the range of a layer's input ``factor`` times what it was: below 1 it saturates, above 1 it is coarse."""

    def edit(graph: ir.Model) -> None:
        _, quantiser, _ = _layer(graph, share)
        scales = {node.inputs[1] for node in (quantiser, *quantiser.outputs[0].consumers())}
        for scale in scales:
            assert scale is not None
            _set(scale, lambda array: array * factor)

    return edit


def rotate_channels(share: float) -> Edit:
    """Move the INT8 weights of a layer by one output channel; the scales stay."""

    def edit(graph: ir.Model) -> None:
        _, _, weight = _layer(graph, share)
        values, axis = weight.inputs[0], _axis(weight)
        assert values is not None
        _set(values, lambda array: np.roll(array, 1, axis))

    return edit


def rescale_channels(share: float, factor: float) -> Edit:
    """Make every other output channel's weight scale of a layer ``factor`` times what it was."""

    def edit(graph: ir.Model) -> None:
        _, _, weight = _layer(graph, share)
        scales = weight.inputs[1]
        assert scales is not None
        _set(scales, lambda array: np.where(np.arange(array.size) % 2 == 0, array * factor, array))

    return edit


def take_weights(other: ir.Model) -> Edit:
    """Everything task-dependent of another task's graph that fits: what binding the wrong task id would give."""

    def edit(graph: ir.Model) -> None:
        for name, value in graph.graph.initializers.items():
            theirs = other.graph.initializers.get(name)
            ours = value.const_value
            if theirs is None or theirs.const_value is None or ours is None or ours.dtype == ir.DataType.INT64:
                continue
            if tuple(ours.shape) == tuple(theirs.const_value.shape):
                taken = theirs.const_value.numpy().copy()
                _set(value, lambda _, taken=taken: taken)  # type: ignore[misc]

    return edit


def _set(value: ir.Value, change: Callable[[Array], Array]) -> None:
    assert value.const_value is not None
    array = value.const_value.numpy()
    value.const_value = ir.tensor(change(array).astype(array.dtype), name=value.name)


def _axis(node: ir.Node) -> int:
    return int(node.attributes["axis"].value) if "axis" in node.attributes else 1


def drop_prompt(task: Task) -> Edit:
    """Every sample of the batch gets the text of the first one, which has no prompt."""

    def edit(graph: ir.Model) -> None:
        nobody = add_constant(graph, "without_prompt", np.zeros(len(ROWS[task.guided]), np.int64))
        _insert(graph, "encoder_hidden_states", lambda text: [ir.node("Gather", [text, nobody])])

    return edit


def shrink_delta(task: Task, factor: float) -> Edit:
    """The sample with the prompt moves towards the one without, as if the text had less to say."""
    count = len(ROWS[task.guided])
    own, taken = np.ones((count, 1, 1, 1), np.float32), np.zeros((count, 1, 1, 1), np.float32)
    own[-1], taken[-1] = factor, 1 - factor

    def edit(graph: ir.Model) -> None:
        rows = add_constant(graph, "neighbour", np.array([*range(count - 1), count - 2], np.int64))
        shares = [add_constant(graph, "share", share) for share in (own, taken)]
        last = graph.graph.outputs[0]
        neighbour = ir.node("Gather", [last, rows])
        kept, mixed = ir.node("Mul", [last, shares[0]]), ir.node("Mul", [neighbour.outputs[0], shares[1]])
        out = ir.node("Add", [kept.outputs[0], mixed.outputs[0]])
        out.outputs[0].shape, out.outputs[0].type = last.shape, last.type
        replace_value(last, out.outputs[0])
        # What was just made to read its own result reads the old one again.
        neighbour.replace_input_with(0, last)
        kept.replace_input_with(0, last)
        graph.graph.extend([neighbour, kept, mixed, out])

    return edit


def overwrite(channels: slice, value: float) -> Edit:
    """Fill channels of the UNet's ``sample``."""

    def edit(graph: ir.Model) -> None:
        keep, fill = (_channels(graph, default) for default in (1, 0))
        keep[:, channels], fill[:, channels] = 0, value
        factor, addend = add_constant(graph, "keep", keep), add_constant(graph, "fill", fill)

        def nodes(sample: ir.Value) -> list[ir.Node]:
            kept = ir.node("Mul", [sample, factor])
            return [kept, ir.node("Add", [kept.outputs[0], addend])]

        _insert(graph, SAMPLE, nodes)

    return edit


def clip_channel(channel: int, most: float) -> Edit:
    """Cut a channel of ``sample`` off, as a quantiser with too small a range does."""

    def edit(graph: ir.Model) -> None:
        limit = _channels(graph, float(np.finfo(np.float32).max))
        limit[:, channel] = most
        largest = add_constant(graph, "limit", limit)
        _insert(graph, SAMPLE, lambda sample: [ir.node("Min", [sample, largest])])

    return edit


def _channels(graph: ir.Model, value: float) -> Array:
    """[1, channels of ``sample``, 1, 1]"""
    sample = find_input(graph, SAMPLE)
    assert sample is not None and sample.shape is not None
    return np.full((1, int(sample.shape[1]), 1, 1), value, np.float32)  # type: ignore[arg-type]


def _insert(graph: ir.Model, name: str, nodes: Callable[[ir.Value], list[ir.Node]]) -> None:
    """Put nodes between an input and everything that reads it."""
    value = find_input(graph, name)
    assert value is not None
    readers = tuple(value.uses())
    added = nodes(value)
    for reader, index in readers:
        reader.replace_input_with(index, added[-1].outputs[0])
    first = graph.graph[0]
    graph.graph.insert_before(first, added)


def mask_channel(task: Task, latent_channels: int = 4) -> int:
    """Where in ``sample`` the mask lies."""
    before = task.condition[: task.condition.index("mask")]
    return latent_channels + sum(1 if fill == "mask" else latent_channels for fill in before)


def spoil(graph: Path, edit: Edit, out: Path) -> Path:
    """Write ``graph`` with a defect to ``out``."""
    model = graph_io.load(graph)
    edit(model)
    graph_io.check(model, "a seeded defect")
    return graph_io.save(model, out)
