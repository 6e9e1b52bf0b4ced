"""Small questions and edits that several passes need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

Array = npt.NDArray[Any]

#: Inputs of the UNet graph (see ``mtu_compile.model.export``).
SAMPLE, TASK_IDS = "sample", "task_ids"

#: The dimension that counts samples, where it is free.
BATCH = "batch"

#: What ``task_ids`` is called once the graph only reads rows of tables by it.
TASK = "task"

#: Initialiser that stands in for ``task_ids`` once the graph is bound to a task.
BOUND_TASK = "mtu.task_id"


def op_counts(graph: ir.Model) -> Counter[str]:
    """How many nodes of each operator the graph has."""
    return Counter(node.op_type for node in graph.graph)


def find_input(graph: ir.Model, name: str) -> ir.Value | None:
    """The graph input called ``name``."""
    return next((value for value in graph.graph.inputs if value.name == name), None)


def times_batch(dimension: int | str | None) -> int | None:
    """How many times the batch a dimension is that grows with it (``"batch"``, ``"4*batch"``); ``None`` for others."""
    factor, _, name = str(dimension).rpartition("*")
    if name != BATCH or not (factor.isdigit() or not factor):
        return None
    return int(factor or 1)


def static_shape(value: ir.Value) -> list[int]:
    """Sizes of a value whose shape is known; an empty list if it is not."""
    return [int(d) for d in value.shape] if value.shape is not None and value.shape.is_static() else []  # type: ignore[arg-type]


def constant(value: ir.Value | None) -> Array | None:
    """The array of a value that is the same in every run, else ``None``. Reads the whole tensor."""
    tensor = constant_tensor(value)
    return None if tensor is None else tensor.numpy()


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Like ``constant``, but nothing is read."""
    if value is None or value.is_graph_input() or not value.is_initializer():
        return None
    return value.const_value


def add_constant(graph: ir.Model, name: str, array: Array) -> ir.Value:
    """Add an initialiser; ``name`` gets a number if it is taken."""
    return _register(graph, name, ir.tensor(array), ir.Shape(array.shape))


def add_lazy_constant(
    graph: ir.Model, name: str, shape: tuple[int, ...], dtype: ir.DataType, compute: Callable[[], Array]
) -> ir.Value:
    """Add an initialiser that is computed each time it is read, so that large weights never pile up in memory."""
    tensor = ir.LazyTensor(lambda: ir.tensor(compute()), dtype=dtype, shape=ir.Shape(shape))
    return _register(graph, name, tensor, ir.Shape(shape))


def _register(graph: ir.Model, name: str, tensor: ir.TensorProtocol, shape: ir.Shape) -> ir.Value:
    taken = graph.graph.initializers
    unique = next(n for n in _numbered(name) if n not in taken)
    tensor.name = unique
    value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    graph.graph.register_initializer(value)
    return value


def _numbered(name: str) -> Iterator[str]:
    yield name
    number = 1
    while True:
        yield f"{name}_{number}"
        number += 1


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every user of ``old`` read ``new``; if the graph outputs ``old``, ``new`` takes its name."""
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.replaced", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def remove_unused(graph: ir.Model) -> None:
    """Remove nodes and initialisers nothing reads."""
    RemoveUnusedNodesPass()(graph)


def users(value: ir.Value) -> tuple[ir.Node, ...]:
    """Nodes that read ``value``."""
    return tuple(value.consumers())


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that reads ``value`` if there is exactly one, it is an ``op_type``, and the graph does not output it."""
    nodes = users(value)
    if len(nodes) != 1 or len(value.uses()) != 1 or value.is_graph_output() or nodes[0].op_type != op_type:
        return None
    return nodes[0]


def produced_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes ``value`` if it is an ``op_type``."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a binary node."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def scope(node: ir.Node) -> str:
    """The module a node was exported from: node names are ``<module path>/<operator>``."""
    return (node.name or "").rpartition("/")[0]


def reached_inputs(value: ir.Value) -> tuple[str, ...]:
    """Names of the graph inputs that ``value`` is computed from, sorted."""
    return tuple(sorted(v.name or "" for v in ancestors((value,)) if v.is_graph_input()))


def ancestors(values: Iterable[ir.Value]) -> Iterator[ir.Value]:
    """``values`` and everything they are computed from, each once."""
    seen: set[ir.Value] = set()
    todo = list(values)
    while todo:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        yield value
        producer = value.producer()
        if producer is not None:
            todo.extend(v for v in producer.inputs if v is not None)


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Value of a node's attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def in_float64(array: Array) -> npt.NDArray[np.float64]:
    """For arithmetic on weights: rounding happens once, at the end."""
    return array.astype(np.float64)


def read_float64(tensor: ir.TensorProtocol) -> npt.NDArray[np.float64]:
    """Read a weight for arithmetic; if it lies in a file, the file is let go of again."""
    array = in_float64(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return array
