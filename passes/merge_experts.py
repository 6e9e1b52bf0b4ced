"""``mtu::merge-experts``: experts with constant gates become one dense feed-forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import (
    Array,
    add_lazy_constant,
    constant,
    constant_tensor,
    produced_by,
    read_float64,
    replace_value,
)
from passes.base import PassContext, PassResult
from passes.experts import Expert, Mixture, find_mixtures, require_bound_task, rewrite_mixtures


@dataclass(frozen=True, eq=False)
class _Part:
    """An expert's weights, and the constant affine of the norm in front of it: it reads ``source · scale + shift``.

    Tensors, not values of the graph: they are read when the merged weights are written, long after the graph has
    forgotten them.

    Attributes:
        source: what the affine is applied to, [..., C].
        scale: C or 1 numbers, or ``None`` for 1.
        shift: C or 1 numbers, or ``None`` for 0.
        up: [C, 2h].
        up_bias: [2h], or ``None`` for 0.
        down: [h, C].
        down_bias: [C], or ``None`` for 0.
        weight: the expert's constant gate.
    """

    source: ir.Value
    scale: ir.TensorProtocol | None
    shift: ir.TensorProtocol | None
    up: ir.TensorProtocol
    up_bias: ir.TensorProtocol | None
    down: ir.TensorProtocol
    down_bias: ir.TensorProtocol | None
    weight: float


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

    The arithmetic is done in float64, when the weights are written.

    Fires on mixtures (see ``passes.experts``) whose gates are single constants. Does not fire on a gate that is not
    constant or differs between channels or tokens, on experts with different kinds of Gelu, nor on experts that read
    different values beyond a constant affine.
    """

    id = "mtu::merge-experts"
    after: tuple[str, ...] = ("mtu::bind-task", "mtu::fold-routing", "mtu::drop-experts")

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        require_bound_task(graph)

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        def merge(mixture: Mixture) -> int | str:
            parts = _parts(mixture)
            if isinstance(parts, str):
                return parts
            _merge(graph, mixture, parts)
            return 1

        return rewrite_mixtures(self.id, graph, merge)

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        for mixture in find_mixtures(graph):
            if not isinstance(_parts(mixture), str):
                raise PassError(f"{self.id} left the experts of {mixture.name!r} apart")


def _parts(mixture: Mixture) -> tuple[_Part, ...] | str:
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
    parts = tuple(_part(expert, weight, *_affine(expert)) for expert, weight in pairs)
    if len({part.source for part in parts}) > 1:
        parts = tuple(_part(expert, weight, expert.x, None, None) for expert, weight in pairs)
    if len({part.source for part in parts}) > 1:
        return "the experts read different values"
    return parts


def _part(expert: Expert, weight: float, source: ir.Value, scale: ir.Value | None, shift: ir.Value | None) -> _Part:
    up, down = constant_tensor(expert.up), constant_tensor(expert.down)
    assert up is not None and down is not None
    vectors = [constant_tensor(v) for v in (scale, shift, expert.up_bias, expert.down_bias)]
    return _Part(source, vectors[0], vectors[1], up, vectors[2], down, vectors[3], weight)


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


def _merge(graph: ir.Model, mixture: Mixture, parts: Sequence[_Part]) -> None:
    first = parts[0]
    dtype = first.up.dtype
    channels, outputs = first.up.shape.numpy()[0], first.down.shape.numpy()[1]
    hidden = sum(part.down.shape.numpy()[0] for part in parts)
    numpy = dtype.numpy()
    path = mixture.experts[0].scope

    def weight(name: str, shape: tuple[int, ...], compute: Callable[[Sequence[_Part]], Array]) -> ir.Value:
        return add_lazy_constant(graph, f"{path}.{name}", shape, dtype, lambda: compute(parts).astype(numpy))

    up = weight("net.0.proj.weight", (channels, 2 * hidden), _up)
    up_bias = weight("net.0.proj.bias", (2 * hidden,), _up_bias)
    down = weight("net.2.weight", (hidden, outputs), _down)
    down_bias = weight("net.2.bias", (outputs,), _down_bias)

    nodes: list[ir.Node] = []

    def add(
        op_type: str, module: str, *inputs: ir.Value, count: int = 1, **attributes: int | str
    ) -> Sequence[ir.Value]:
        name = f"{path}.{module}/{op_type}"
        number = sum(node.name == name or str(node.name).startswith(f"{name}_") for node in nodes)
        node = ir.node(op_type, list(inputs), attributes=attributes, num_outputs=count, name=name)
        node.name = f"{name}_{number}" if number else name
        for i, output in enumerate(node.outputs):
            output.name = f"{node.name}.{i}"
        nodes.append(node)
        return node.outputs

    (projected,) = add("MatMul", "net.0.proj", first.source, up)
    (projected,) = add("Add", "net.0.proj", projected, up_bias)
    value, gate = add("Split", "net.0", projected, count=2, axis=-1, num_outputs=2)
    (gate,) = add("Gelu", "net.0", gate, approximate=mixture.experts[0].approximate)
    (product,) = add("Mul", "net.0", value, gate)
    (output,) = add("MatMul", "net.2", product, down)
    (output,) = add("Add", "net.2", output, down_bias)
    output.shape, output.type = mixture.output.shape, mixture.output.type
    last = mixture.output.producer()
    assert last is not None
    graph.graph.insert_before(last, nodes)
    replace_value(mixture.output, output)


def _up(parts: Sequence[_Part]) -> Array:
    return _values_then_gates([_vector(part.scale, 1.0)[:, None] * read_float64(part.up) for part in parts])


def _up_bias(parts: Sequence[_Part]) -> Array:
    biases = []
    for part in parts:
        up = read_float64(part.up)
        shift = np.broadcast_to(_vector(part.shift, 0.0), up.shape[:1])
        biases.append(shift @ up + _vector(part.up_bias, 0.0))
    return _values_then_gates(biases)


def _down(parts: Sequence[_Part]) -> Array:
    return np.concatenate([part.weight * read_float64(part.down) for part in parts])


def _down_bias(parts: Sequence[_Part]) -> Array:
    shape = (parts[0].down.shape.numpy()[1],)
    biases = [part.weight * np.broadcast_to(_vector(part.down_bias, 0.0), shape) for part in parts]
    return np.sum(biases, axis=0)  # type: ignore[no-any-return]


def _values_then_gates(arrays: Sequence[Array]) -> Array:
    halves = [np.split(array, 2, axis=-1) for array in arrays]
    return np.concatenate([value for value, _ in halves] + [gate for _, gate in halves], axis=-1)


def _vector(tensor: ir.TensorProtocol | None, default: float) -> Array:
    return np.array([default]) if tensor is None else read_float64(tensor).reshape(-1)
