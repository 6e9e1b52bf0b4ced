"""Give layers of a Q/DQ graph back to float, as if they had never been quantised.

    Given:   x → Q → DQ → Reshape → MatMul(DQ(w8)) → Add(b8)
    Result:  x → Reshape → MatMul(w) → Add(b)

where w and b are those of the float graph the Q/DQ graph was made from. All other layers keep their scales and biases,
which quantising again without the layer would give them too: ranges are those of the float graph, and bias correction
looks at one layer at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.quantize import QuantisationReport
from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq

if TYPE_CHECKING:
    import onnx_ir as ir


def dequantise_onnx(
    int8: Path, model: Path, layers: Collection[str], report: QuantisationReport, out: Path | None = None
) -> QuantisationReport:
    """Make ``layers`` of a Q/DQ graph float again, in its file or another one.

    The graph is what ``quantize_onnx`` would make with ``layers`` among its ignored scopes, but for names of a few
    values; that takes as long as quantising did, because most of it is matching patterns in the graph.

    Args:
        int8: ONNX file that ``quantize_onnx`` wrote; replaced where there is no ``out``.
        model: ONNX file it was made from.
        layers: node names.
        report: of ``quantize_onnx``.
        out: ONNX file to write.

    Returns:
        The report, with the layers as ignored scopes and the graph's counts as they are now.

    Raises:
        PassError: there is no such layer, nothing INT8 is left, or the graphs do not belong together.
    """
    graph, out = graph_io.load(int8), out or int8
    dequantise(graph, graph_io.load(model), layers)
    counts, floats = qdq.verify(graph)
    activations, weights = qdq.count_pairs(graph)
    graph_io.check(graph, "calibration.dequantise")
    graph_io.save(graph, out)
    return replace(
        report,
        settings=replace(report.settings, ignored_scopes=(*report.settings.ignored_scopes, *layers)),
        activations=activations,
        weights=weights,
        layers=counts,
        float_layers=floats,
        bytes_after=graph_io.disk_bytes(out),
    )


def dequantise(int8: ir.Model, original: ir.Model, layers: Collection[str]) -> int:
    """Make ``layers`` of the Q/DQ graph ``int8`` float again, in place.

    Args:
        int8: a Q/DQ graph (``quantize_onnx``).
        original: the float graph it was made from.
        layers: node names. One that is float already is left alone.

    Returns:
        How many layers were changed.

    Raises:
        PassError: one of the graphs has no such layer, or they do not belong together.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    originals = {str(node.name): node for node in original.graph if node.op_type in qdq.LAYERS}
    nodes = [node for node in int8.graph if node.op_type in qdq.LAYERS and node.name in layers]
    if missing := sorted(set(layers) - {str(node.name) for node in nodes if node.name in originals}):
        raise PassError(f"there is no layer called {missing[0]!r} to give back to float", hint="quantise it again")
    changed = [node for node in nodes if any(map(qdq.is_dequantised, node.inputs[:2]))]
    named = {node.name: node for node in int8.graph}
    values = _Floats(int8)
    for node in changed:
        twin = originals[str(node.name)]
        values.give(node, twin)
        for addition in _additions(twin):  # the bias of a MatMul is added behind it, and may have been corrected
            values.give(named[addition.name], addition, constants_only=True)
    RemoveUnusedNodesPass()(int8)
    return len(changed)


class _Floats:
    """Values of a float graph, found or made in its Q/DQ twin."""

    def __init__(self, int8: ir.Model) -> None:
        self._graph = int8.graph
        self._known = {value.name: value for node in int8.graph for value in node.outputs}
        self._known |= {value.name: value for value in int8.graph.inputs}
        self._made: dict[str | None, ir.Value] = {}

    def give(self, node: ir.Node, twin: ir.Node, *, constants_only: bool = False) -> None:
        """Let ``node`` read what ``twin`` of the float graph reads."""
        for i, value in enumerate(twin.inputs):
            if value is not None and not (constants_only and qdq.constant(value) is None):
                node.replace_input_with(i, self._find(value, node))

    def _find(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        if value.name in self._made:
            return self._made[value.name]
        known, maker = self._known.get(value.name), value.producer()
        if qdq.constant(value) is not None:
            made = self._constant(value)
        elif known is not None and not qdq.is_dequantised(known):
            made = known
        elif known is not None and maker is not None and maker.op_type in qdq.TRANSPARENT:
            made = self._copy(maker, reader)
        else:
            raise PassError(f"the quantised graph has no value {value.name!r}", hint="quantise it again")
        self._made[value.name] = made
        return made

    def _constant(self, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        there = self._graph.initializers.get(str(value.name))
        if there is not None and there.const_value is not None:
            assert value.const_value is not None
            if np.array_equal(there.const_value.numpy(), value.const_value.numpy()):
                return there
        name = f"{value.name}/float" if there is not None else value.name
        made = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        self._graph.register_initializer(made)
        return made

    def _copy(self, node: ir.Node, reader: ir.Node) -> ir.Value:
        """``node`` of the float graph, which moves values about, with the inputs it has there."""
        import onnx_ir as ir

        inputs = [None if value is None else self._find(value, reader) for value in node.inputs]
        made = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), name=f"{node.name}/float")
        old, new = node.outputs[0], made.outputs[0]
        new.name, new.shape, new.type = f"{old.name}/float", old.shape, old.type
        self._graph.insert_before(reader, made)
        return new


def _additions(layer: ir.Node) -> list[ir.Node]:
    """The additions of constants right behind a layer."""
    users = [user for user in layer.outputs[0].consumers() if user.op_type == "Add"]
    return [user for user in users if any(qdq.constant(value) is not None for value in user.inputs)]
