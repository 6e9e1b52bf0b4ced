"""``mtu::align-ranges``: a factor for each task before a layer and out behind it, so that one scale serves them all."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import TASK, attribute, constant, constant_tensor, find_input, remove_unused, users
from mtu_compile.graph.qdq import LAYERS
from passes.base import Alignment, PassContext, PassResult, Skipped
from passes.sample_factors import SampleFactors
from passes.task_tables import read_table

Factors = tuple[float, ...]


class AlignRanges:
    """Multiply what goes into a layer by a factor of the sample's task, and what comes out by its inverse.

    A layer is linear: ``W x + b = (W (c x)) / c + b``. One INT8 scale for all tasks then costs none of them bits; with
    powers of two the float graph's numbers stay the same to the bit, as long as none leaves the type's range.

    *Given* ``context.alignment.factors``, a number c_t for each task::

        y = Add(MatMul(x, weight), bias)
        z = Conv(x, weight, bias)

    *Result*::

        y = Add(Mul(MatMul(Mul(x, c[task]), weight), 1/c[task]), bias)
        z = Add(Mul(Conv(Mul(x, c[task]), weight), 1/c[task]), bias)

    Where a table or a constant is multiplied anyway the factor goes into it and costs nothing: γ and β of a norm, the
    gates of experts, the constant that scales queries and keys. Else the Mul comes where the tensor is smallest: in
    front of the layer, or on the values of the attention before it. Layers that read one value with the same factors
    share one multiplication.

    Fires on Conv, MatMul and Gemm of constant weights. Does not fire on a layer whose factors are all 1, that has been
    aligned, that multiplies two activations, or whose input is not of each sample. Refuses (``PassError``) a layer the
    graph does not have, factors that are not positive or not as many as the tasks, and a graph without ``task``.
    """

    id = "mtu::align-ranges"
    after: tuple[str, ...] = ("mtu::tabulate-tasks", "mtu::merge-experts", "mtu::freeze-shapes", "mtu::cleanup")

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        alignment = context.alignment
        if alignment is None or not alignment.factors:
            return
        if find_input(graph, TASK) is None:
            raise PassError(f"the graph has no input {TASK!r}", hint="run mtu::tabulate-tasks first")
        layers, rows = _layers(graph), count_rows(graph)
        for name, factors in alignment.factors.items():
            if name not in layers:
                raise PassError(f"the graph has no layer {name!r} to align")
            if rows and len(factors) != rows:
                raise PassError(f"layer {name!r} has {len(factors)} factors, not {rows}")
            if not all(np.isfinite(factor) and factor > 0 for factor in factors):
                raise PassError(f"a factor of layer {name!r} is not positive: {list(factors)}")

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        alignment = context.alignment or Alignment({})
        layers, skipped = _layers(graph), []
        together: dict[tuple[ir.Value, Factors], list[ir.Node]] = {}
        tables = SampleFactors(graph)
        for name, factors in alignment.factors.items():
            layer = layers[name]
            reason = self._refusal(layer, factors) or tables.refusal(layer)
            if reason is not None:
                skipped.append(Skipped(name, reason))
                continue
            source = layer.inputs[0]
            assert source is not None
            together.setdefault((source, tuple(factors)), []).append(layer)
        for (_, factors), group in together.items():
            tables.multiply(group, np.array(factors))
            for layer in group:
                tables.divide(layer, np.array(factors))
                layer.metadata_props[self.id] = "1"
        remove_unused(graph)
        return PassResult(self.id, graph, sum(map(len, together.values())), tuple(skipped))

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        alignment, layers = context.alignment or Alignment({}), _layers(graph)
        tables = SampleFactors(graph)
        for name, factors in alignment.factors.items():
            layer = layers.get(name)
            if layer is None or (self._refusal(layer, factors) is None and tables.refusal(layer) is None):
                raise PassError(f"{self.id} left layer {name!r} as it was")

    def _refusal(self, layer: ir.Node, factors: Factors) -> str | None:
        """Why a layer is left alone."""
        if self.id in layer.metadata_props:
            return "it is aligned already"
        if all(factor == 1 for factor in factors):
            return "its factors are all 1"
        if constant_tensor(layer.inputs[1]) is None:
            return "it multiplies two activations"
        if len(layer.inputs) > 2 and layer.inputs[2] is not None and constant_tensor(layer.inputs[2]) is None:
            return "its bias is no constant"
        if layer.op_type == "Gemm" and (attribute(layer, "transA", 0) or attribute(layer, "beta", 1.0) != 1.0):
            return "it transposes its input or scales its bias"
        return None


def _layers(graph: ir.Model) -> Mapping[str, ir.Node]:
    return {node.name or "": node for node in graph.graph if node.op_type in LAYERS}


def count_rows(graph: ir.Model) -> int:
    """Rows of the tables that the graph's ``task`` selects; 0 where no table says it."""
    task = find_input(graph, TASK)
    nodes = () if task is None else users(task)
    tables = (constant(node.inputs[0]) for node in nodes if read_table(node.outputs[0]) is not None)
    return max((len(rows) for rows in tables if rows is not None), default=0)
