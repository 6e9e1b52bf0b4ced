"""Which ONNX opset a graph is of, and what in it needs that opset: importers read up to one.

An importer that meets a newer opset may refuse it in words of its own, or compute an operator by its older meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtu_compile.core.errors import BuildError

if TYPE_CHECKING:
    import onnx_ir as ir

    from targets.base import TargetSpec

#: Nodes named in a refusal; there may be hundreds.
_NAMED = 2


def require_opset(graph: Path, spec: TargetSpec) -> None:
    """``BuildError`` if the ONNX file ``graph`` is of a newer opset than the target's importer reads."""
    from mtu_compile.graph import io as graph_io

    model = graph_io.load(graph)
    opset = model.opset_imports.get("", 0)
    if opset <= spec.opset:
        return
    needs = list(newer_than(model, spec.opset))
    named = "; ".join(needs[:_NAMED]) + (f"; and {len(needs) - _NAMED} more" if len(needs) > _NAMED else "")
    raise BuildError(
        f"{graph.name} is of ONNX opset {opset}, and the importer of target {spec.name!r} reads up to {spec.opset}: "
        f"{named or 'nothing in it needs the newer one'}",
        hint="build in another precision" if needs else f"export the model at opset {spec.opset}",
    )


def newer_than(model: ir.Model, opset: int) -> Iterator[str]:
    """What of ``model`` does not exist in ``opset``, by node: operators, types of inputs and outputs, attributes."""
    from onnx import defs

    own = model.opset_imports.get("", 0)
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            continue
        new = defs.get_schema(node.op_type, own, "")
        if new.since_version <= opset:
            continue
        try:
            old = defs.get_schema(node.op_type, opset, "")
        except defs.SchemaError:
            yield f"node {node.name!r} ({node.op_type}, new in opset {new.since_version})"
            continue
        lacks = [*_types(node.inputs, old.inputs, old), *_types(node.outputs, old.outputs, old)]
        lacks += [f"attribute {name!r}" for name in node.attributes if name not in old.attributes]
        if lacks:
            yield f"node {node.name!r} ({node.op_type} with {lacks[0]}, new in opset {new.since_version})"


def _types(values: Any, formal: Any, schema: Any) -> Iterator[str]:
    """Element types that ``schema`` does not take."""
    constraints = {one.type_param_str: set(one.allowed_type_strs) for one in schema.type_constraints}
    for index, value in enumerate(values):
        if value is None or value.dtype is None or not formal:
            continue
        name = formal[min(index, len(formal) - 1)].type_str
        if f"tensor({value.dtype.name.lower()})" not in constraints.get(name, {name}):
            yield value.dtype.name
