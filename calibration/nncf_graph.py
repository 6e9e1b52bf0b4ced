"""INT8 Q/DQ graphs as NNCF hands them over: ``mtu_compile.graph.qdq`` for graphs that are still protobuf."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mtu_compile.graph import qdq
from mtu_compile.graph.qdq import LAYERS

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["LAYERS", "count_pairs", "drop_idle", "sign_activations", "verify"]


def sign_activations(model: onnx.ModelProto) -> int:
    """``mtu_compile.graph.qdq.sign_activations`` in place; a graph without uint8 quantisers is not touched."""
    return _in_place(model, qdq.sign_activations)


def drop_idle(model: onnx.ModelProto) -> int:
    """``mtu_compile.graph.qdq.drop_idle`` in place; a graph without idle quantisers is not touched."""
    return _in_place(model, qdq.drop_idle)


def _in_place(model: onnx.ModelProto, edit: Callable[[ir.Model], int]) -> int:
    """Let ``edit`` change a view of ``model``, which is written back if anything did change."""
    import onnx_ir as ir

    view: ir.Model = ir.from_proto(model)
    changed = edit(view)
    if changed:
        model.CopyFrom(ir.to_proto(view))
    return changed


def verify(model: onnx.ModelProto) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """``mtu_compile.graph.qdq.verify``: signed int8, zero points 0, float biases, and at least one quantised weight."""
    import onnx_ir as ir

    return qdq.verify(ir.from_proto(model))


def count_pairs(model: onnx.ModelProto) -> tuple[int, int]:
    """``mtu_compile.graph.qdq.count_pairs``."""
    import onnx_ir as ir

    return qdq.count_pairs(ir.from_proto(model))
