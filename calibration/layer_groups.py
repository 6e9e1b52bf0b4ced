"""Layers that become INT8 together: those that read one quantiser, as query, key and value do.

Quantising one of them alone saves nothing: its input is quantised for the others or for none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtu_compile.graph import qdq

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class LayerGroup:
    """Layers that become INT8 together, because they read one quantiser.

    Attributes:
        name: of the first of them.
        members: node names of all of them, in graph order.
        op_type: of the first (``"Conv"``, ``"Gemm"``, ``"MatMul"``).
    """

    name: str
    members: tuple[str, ...]
    op_type: str


def find_groups(int8: ir.Model) -> tuple[LayerGroup, ...]:
    """The quantised layers of a Q/DQ graph, those that read one quantiser together."""
    owner: dict[ir.Value | None, int] = {}
    members: list[list[ir.Node]] = []
    for node in int8.graph:
        if node.op_type not in qdq.LAYERS or not any(qdq.is_dequantised(value) for value in node.inputs[:2]):
            continue
        sources = [q.inputs[0] for place in node.inputs[:2] for q in qdq.activation_quantisers(place)]
        joined = sorted({owner[value] for value in sources if value in owner})
        index = joined[0] if joined else len(members)
        if not joined:
            members.append([])
        members[index].append(node)
        for other in joined[1:]:  # a product of two activations may join what was apart so far
            members[index] += members[other]
            members[other] = []
        owner |= dict.fromkeys(sources, index)
        owner = {value: index if i in joined else i for value, i in owner.items()}
    order = {node: i for i, node in enumerate(int8.graph)}
    groups = [sorted(group, key=order.__getitem__) for group in members if group]
    names = [tuple(str(node.name) for node in group) for group in groups]
    return tuple(
        LayerGroup(members[0], members, group[0].op_type) for members, group in zip(names, groups, strict=True)
    )
