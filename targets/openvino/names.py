"""Names for the nodes of an OpenVINO model that have none, the same in every process."""

from __future__ import annotations

from itertools import count
from typing import Any


def name_nodes(model: Any) -> int:
    """Number the nodes without a name, kind by kind, in the order they are computed; returns how many there are.

    OpenVINO shows such a node as its kind and how many nodes the process had made before it (``Constant_44633``), and
    writes that into the IR: two builds of one graph would differ in it, and in the hashes of their files. Names that
    are there, those of the ONNX graph above all, stay, and are not given to others.
    """
    nodes = model.get_ordered_ops()
    nameless = [node for node in nodes if node.get_friendly_name() == node.get_name()]
    taken = {node.get_friendly_name() for node in nodes} - {node.get_name() for node in nameless}
    numbers: dict[str, Any] = {}
    for node in nameless:
        kind = node.get_type_name()
        names = (f"{kind}_{number}" for number in numbers.setdefault(kind, count()))
        node.set_friendly_name(next(name for name in names if name not in taken))
    return len(nameless)
