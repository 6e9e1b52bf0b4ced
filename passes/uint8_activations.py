"""``mtu::uint8-activations``: activations are quantised the way x86 CPUs multiply them right."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph import qdq
from mtu_compile.graph.edit import add_constant, constant, constant_tensor, produced_by, users
from passes.base import PassContext, PassResult, Skipped

#: What int8's zero is in uint8: the whole range moves by it, and no number changes.
OFFSET = 128


class Uint8Activations:
    """Write activations as uint8 with a zero point of 128 instead of int8 with 0: the same numbers in the same steps.

    *Given*::

        q = QuantizeLinear(x, s, int8 0); u = DequantizeLinear(q, s, int8 0); y = Conv(u, DQ(w int8, s_w))

    *Result*::

        q = QuantizeLinear(x, s, uint8 128); u = DequantizeLinear(q, s, uint8 128); y = Conv(u, DQ(w int8, s_w))

    x86 CPUs multiply unsigned bytes with signed ones. Given signed activations, OpenVINO's convolutions halve their
    resolution on every x86 CPU without AMX (docs/decisions/0011-int8-on-every-cpu.md). Linear layers with constant
    weights are right with either sign on all of them, and faster signed: what a zero point adds to their results,
    OpenVINO computes as an operation of its own.

    Fires on every int8 quantiser of an activation with zero point 0, and on what dequantises it.

    Does not fire on

    1. weights, which stay int8: constants behind a DequantizeLinear, and those behind a quantiser;
    2. quantisers that are uint8 already, or FP8;
    3. what linear layers alone read, and integers that something else than a DequantizeLinear reads. ``skipped`` names
       them.

    Refuses (``PassError``) an int8 quantiser of an activation with a zero point that is not 0 or not constant.
    """

    id = "mtu::uint8-activations"
    after: tuple[str, ...] = ("mtu::legalise-qdq",)

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        for node in _int8(graph):
            zero = constant(qdq.zero_point(node))
            if zero is None or np.any(zero):
                name = node.name or node.outputs[0].name
                raise PassError(
                    f"quantiser {name!r} has a zero point that is not 0", hint="run mtu::legalise-qdq first"
                )

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        moved: dict[tuple[int, ...], ir.Value] = {}
        rewrites, skipped = 0, list[Skipped]()
        for node in _int8(graph):
            if reason := _why_not(node):
                skipped.append(Skipped(node.name or node.outputs[0].name or "", reason))
                continue
            for each in (node, *users(node.outputs[0])):
                old = qdq.zero_point(each)
                assert old is not None and old.shape is not None
                shape = tuple(old.shape.numpy())
                if shape not in moved:
                    moved[shape] = add_constant(graph, "mtu.uint8_zero", np.full(shape, OFFSET, np.uint8))
                each.replace_input_with(2, moved[shape])
            node.outputs[0].dtype = ir.DataType.UINT8
            rewrites += 1
        return PassResult(self.id, graph, rewrites, tuple(skipped))

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        for node in qdq.quantisers(graph):
            if node.op_type == "QuantizeLinear":
                for reader in users(node.outputs[0]):
                    if reader.op_type == "DequantizeLinear" and _type(reader) != _type(node):
                        raise PassError(
                            f"{reader.name!r} dequantises {_type(reader)}, and {node.name!r} made {_type(node)}"
                        )


def _int8(graph: ir.Model) -> list[ir.Node]:
    """Quantisers that make int8 of an activation."""
    quantisers = (node for node in graph.graph if node.op_type == "QuantizeLinear")
    return [node for node in quantisers if _type(node) == ir.DataType.INT8 and constant_tensor(node.inputs[0]) is None]


def _type(quantiser: ir.Node) -> ir.DataType | None:
    zero = qdq.zero_point(quantiser)
    return None if zero is None else zero.dtype


def _why_not(quantiser: ir.Node) -> str:
    """Why a quantiser has to stay as it is; empty if it need not."""
    output = quantiser.outputs[0]
    if output.is_graph_output() or any(user.op_type != "DequantizeLinear" for user in users(output)):
        return "its integers are used by something else than a DequantizeLinear"
    if all(_only_linear(user.outputs[0]) for user in users(output)):
        return "only linear layers read it, which are right and faster with signed activations"
    return ""


def _only_linear(value: ir.Value) -> bool:
    """Whether an activation goes into linear layers with constant weights, and nowhere else."""
    if value.is_graph_output() or not users(value):
        return False
    for user in users(value):
        if user.op_type in qdq.TRANSPARENT and user.op_type != "Concat":
            if not all(map(_only_linear, user.outputs)):
                return False
        elif user.op_type not in ("MatMul", "Gemm") or user.inputs[0] is not value or not _is_weight(user.inputs[1]):
            return False
    return True


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a layer's second operand is a constant in INT8."""
    dequantiser = produced_by(value, "DequantizeLinear")
    return dequantiser is not None and constant_tensor(dequantiser.inputs[0]) is not None
