"""``mtu::freeze-shapes``: every shape becomes static, but for the batch where it is to stay free."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import BATCH, remove_unused, times_batch
from passes.base import PassContext, PassResult
from passes.folding import fold_small_constants
from passes.free_batch import WITNESSES, drop_expansions, free_batch

#: Name of a dynamic dimension in an exported graph, and where its size is in the context.
DIMENSIONS = {"batch": "batch", "height": "height", "width": "width", "length": "text_length"}

#: Inputs whose second dimension counts the prompt's tokens.
_TEXT = ("encoder_hidden_states", "input_ids")


class FreezeShapes:
    """Give every dynamic dimension its size, and fold the computations of shapes away.

    *Given*::

        sample [batch, 8, height, width], …
        y = Reshape(x, Concat(Shape(x, 0:1), [-1], [64]))

    *Result*::

        sample [2, 8, 64, 64], …
        y = Reshape(x, [2, -1, 64])        # and every value of the graph has a static shape

    With no batch in the context, the dimension ``batch`` stays free, and nothing else does: no node asks for a size,
    every ``Reshape`` takes the batch from its input, and what was repeated for each sample (the timestep) broadcasts::

        sample [batch, 8, 64, 64], …
        y = Reshape(x, [0, 4096, 64])      # and the only size of any value that is not static is ``batch``

    Such a graph is frozen by running the pass again with a batch, quantised or not.

    Fires on inputs with a dimension called ``batch``, ``height``, ``width`` or ``length``, and on computations of
    shapes. Does not fire on a static graph. Refuses (``PassError``) a dynamic dimension other than the batch that it is
    given no size for, sizes that contradict a static dimension, sizes the graph cannot take, a value whose size depends
    on the data, and, where the batch stays free, a node that computes with it.
    """

    id = "mtu::freeze-shapes"
    after: tuple[str, ...] = ("mtu::bind-task", "mtu::fold-routing", "mtu::drop-experts", "mtu::merge-experts")

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        for value in graph.graph.inputs:
            for axis, dimension in enumerate(_dimensions(value)):
                wanted = _size(value, axis, dimension, context)
                if dimension == BATCH and context.batch is None:
                    continue
                if wanted is None:
                    raise PassError(f"no size is given for dimension {_label(dimension)!r} of input {value.name!r}")
                if wanted < 1 or (isinstance(dimension, int) and wanted != dimension):
                    raise PassError(
                        f"input {value.name!r} cannot have size {wanted} in dimension {axis}: "
                        + (f"it is {dimension}" if isinstance(dimension, int) else "sizes are positive")
                    )

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        changed = [value for value in graph.graph.inputs if _wanted(value, context) != _dimensions(value)]
        shapes = _shape_nodes(graph)
        if not changed and not shapes and not _unknown(graph, context):
            return PassResult(self.id, graph, 0)
        if context.batch is None and any(BATCH in _dimensions(value) for value in graph.graph.inputs):
            twin = graph.clone()
            for model, batch in zip((graph, twin), WITNESSES, strict=True):
                _freeze(model, replace(context, batch=batch), broadcast=True)
            free_batch(graph, twin)
            remove_unused(graph)
        else:
            _freeze(graph, context)
        return PassResult(self.id, graph, len(changed) + shapes - _shape_nodes(graph))

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        dynamic = _unknown(graph, context)
        if dynamic:
            raise PassError(
                f"{len(dynamic)} values have no static shape, the first is {dynamic[0].name!r}",
                hint="can the model take this size? height and width divide by its downsampling",
            )
        for node in graph.graph:
            if node.op_type in ("Shape", "Size"):
                raise PassError(f"node {node.name!r} still computes a shape")


def _freeze(graph: ir.Model, context: PassContext, *, broadcast: bool = False) -> None:
    """Give every dimension its size. ``broadcast``: what is repeated for each sample is not."""
    for value in graph.graph.inputs:
        value.shape = ir.Shape(_wanted(value, context))
    declared = {value: _dimensions(value) for value in graph.graph.outputs}
    _forget_shapes(graph)
    # Folding learns shapes node by node as constants appear; ONNX's own inference then fills what is left.
    fold_small_constants(graph)
    ShapeInferencePass()(graph)
    if broadcast and drop_expansions(graph):
        _forget_shapes(graph)
        ShapeInferencePass()(graph)
    remove_unused(graph)
    for value, before in declared.items():
        _check_output(value, before, context)


def _forget_shapes(graph: ir.Model) -> None:
    for node in graph.graph:
        for output in node.outputs:
            output.shape = None


def _wanted(value: ir.Value, context: PassContext) -> list[int | str | None]:
    """The dimensions an input is to have: one without a size stays as it is."""
    sizes = [(d, _size(value, axis, d, context)) for axis, d in enumerate(_dimensions(value))]
    return [dimension if size is None else size for dimension, size in sizes]


def _dimensions(value: ir.Value) -> list[int | str | None]:
    if value.shape is None:
        raise PassError(f"{value.name!r} has no shape")
    return [d if isinstance(d, int) else d.value for d in value.shape]


def _size(value: ir.Value, axis: int, dimension: int | str | None, context: PassContext) -> int | None:
    if isinstance(dimension, int):
        is_text = axis == 1 and value.name in _TEXT and context.text_length is not None
        return context.text_length if is_text else dimension
    found: int | None = getattr(context, DIMENSIONS.get(dimension or "", ""), None) if dimension in DIMENSIONS else None
    return found


def _label(dimension: int | str | None) -> str:
    return "?" if dimension is None else str(dimension)


def _check_output(value: ir.Value, declared: list[int | str | None], context: PassContext) -> None:
    """The graph promises the size of its outputs in the same names as that of its inputs."""
    if value.shape is None:
        return  # ``ensures`` says so
    for axis, (before, after) in enumerate(zip(declared, _dimensions(value), strict=True)):
        wanted = before if isinstance(before, int) else getattr(context, DIMENSIONS.get(before or "", "_"), None)
        if wanted is not None and after != wanted:
            raise PassError(
                f"output {value.name!r} has size {after} in dimension {axis}, not {wanted}",
                hint="height and width have to divide by the model's downsampling",
            )


def _shape_nodes(graph: ir.Model) -> int:
    return sum(node.op_type in ("Shape", "Size") for node in graph.graph)


def _unknown(graph: ir.Model, context: PassContext) -> list[ir.Value]:
    """Values with a dimension that is not static, nor the batch where it may be free."""
    values = [*graph.graph.inputs, *(v for node in graph.graph for v in node.outputs)]
    return [v for v in values if v.name and not _known(v, context)]


def _known(value: ir.Value, context: PassContext) -> bool:
    if value.shape is None:
        return False
    free = [d.value for d in value.shape if not isinstance(d, int)]
    return not free or (context.batch is None and all(times_batch(dimension) for dimension in free))
