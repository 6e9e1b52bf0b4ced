"""``mtu::merge-experts``: the experts of a block become one dense feed-forward."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import constant, constant_tensor, produced_by
from passes.base import PassContext, PassResult
from passes.experts import Expert, Mixture, find_mixtures, require_bound_task, rewrite_mixtures
from passes.gated_experts import gate_tables, merge_gated
from passes.merged_weights import FeedForward, Part, part_of, put_in_place


class MergeExperts:
    """Merge the experts of one block, and fold the affine of their norms into the merged up projection.

    *Given*, for N experts (one affine for all, or one for each)::

        x_i = Add(Mul(norm, gamma_i), beta_i)
        value_i, gate_i = Split(Add(MatMul(x_i, up_i), up_bias_i))
        e_i = Add(MatMul(Mul(value_i, Gelu(gate_i)), down_i), down_bias_i)
        y = Mul(e_0, w_0) + … + Mul(e_{N-1}, w_{N-1})

    *Result*, one feed-forward as wide as the experts together::

        value, gate = Split(Add(MatMul(norm, up), up_bias))
        y = Add(MatMul(Mul(value, Gelu(gate)), down), down_bias)

        up       = [diag(gamma_i) · value half of up_i, for all i | the same of the gate halves]
        up_bias  = [(beta_i · up_i + up_bias_i)'s value half, for all i | its gate half]
        down     = rows w_i · down_i, for all i
        down_bias = sum of w_i · down_bias_i

    Where the task is an input (after ``mtu::tabulate-tasks``) gates are rows of tables, and the value half is
    multiplied by them (see ``passes.gated_experts``). The arithmetic on weights is done in float64, when they are
    written.

    Fires on mixtures (see ``passes.experts``) whose gates are single constants, or rows of tables. Does not fire on a
    gate that is neither, or differs between channels or tokens, nor on experts with different kinds of Gelu; with
    constant gates, not on experts that read different values beyond a constant affine.
    """

    id = "mtu::merge-experts"
    after: tuple[str, ...] = ("mtu::bind-task", "mtu::fold-routing", "mtu::drop-experts", "mtu::tabulate-tasks")

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        require_bound_task(graph)

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        def merge(mixture: Mixture) -> int | str:
            if (tables := gate_tables(mixture)) is not None:
                return merge_gated(graph, mixture, tables)
            parts = _parts(mixture)
            if isinstance(parts, str):
                return parts
            _merge(graph, mixture, parts)
            return 1

        return rewrite_mixtures(self.id, graph, merge)

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        for mixture in find_mixtures(graph):
            if gate_tables(mixture) is not None or not isinstance(_parts(mixture), str):
                raise PassError(f"{self.id} left the experts of {mixture.name!r} apart")


def _parts(mixture: Mixture) -> tuple[Part, ...] | str:
    """The experts and their affines, or why they cannot be merged."""
    gates = [constant(expert.gate) for expert in mixture.experts]
    weights = [float(gate.item()) for gate in gates if gate is not None and gate.size == 1]
    if any(gate is None for gate in gates):
        return "a gate is not constant"
    if len(weights) != len(gates):
        return "a gate differs between channels or tokens"
    if len({expert.approximate for expert in mixture.experts}) > 1:
        return "the experts have different activations"
    pairs = list(zip(mixture.experts, weights, strict=True))
    parts = tuple(part_of(expert, weight, *_affine(expert)) for expert, weight in pairs)
    if len({part.source for part in parts}) > 1:
        parts = tuple(part_of(expert, weight, expert.x) for expert, weight in pairs)
    if len({part.source for part in parts}) > 1:
        return "the experts read different values"
    return parts


def _affine(expert: Expert) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
    """What the expert reads as (source, scale, shift)."""
    shifted, shift = _constant_operand(expert.x, "Add", expert)
    source, scale = _constant_operand(shifted, "Mul", expert)
    return source, scale, shift


def _constant_operand(value: ir.Value, op_type: str, expert: Expert) -> tuple[ir.Value, ir.Value | None]:
    """``value`` without the constant vector that the node computing it adds or multiplies."""
    node = produced_by(value, op_type)
    for index in (0, 1) if node is not None else ():
        assert node is not None
        operand, rest = node.inputs[index], node.inputs[1 - index]
        if rest is not None and constant_tensor(rest) is None and _is_channel_vector(operand, expert):
            return rest, operand
    return value, None


def _is_channel_vector(value: ir.Value | None, expert: Expert) -> bool:
    tensor, up = constant_tensor(value), constant_tensor(expert.up)
    if tensor is None or up is None:
        return False
    *leading, last = tensor.shape.numpy() or (1,)
    return all(size == 1 for size in leading) and last in (1, up.shape.numpy()[0])


def _merge(graph: ir.Model, mixture: Mixture, parts: Sequence[Part]) -> None:
    merged = FeedForward(graph, mixture.experts[0].scope)
    projected = merged.up(parts, parts[0].source)
    product = merged.geglu(projected, mixture.experts[0].approximate)
    output = merged.down_bias(parts, merged.down(parts, product))
    put_in_place(graph, mixture, merged, output)
