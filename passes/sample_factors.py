"""Factors of the samples' tasks, brought into a graph where they cost least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mtu_compile.graph.edit import (
    TASK,
    add_constant,
    attribute,
    constant,
    constant_tensor,
    find_input,
    produced_by,
    replace_value,
    scope,
    times_batch,
)
from passes.task_tables import add_table

Array = NDArray[np.float64]

#: What a factor passes through unchanged, as long as each sample's numbers stay together.
_MOVES = ("Reshape", "Transpose")


class SampleFactors:
    """Multiplies values of a graph, [batch, …], by rows of tables."""

    def __init__(self, graph: ir.Model) -> None:
        self._graph, self._task = graph, find_input(graph, TASK)
        self._tables: dict[tuple[bytes, tuple[int, ...]], ir.Value] = {}
        known = None if self._task is None else self._task.shape
        self._batch = None if known is None else known[0]

    def refusal(self, layer: ir.Node) -> str | None:
        """Why what goes into and out of ``layer`` cannot be multiplied sample by sample."""
        if not all(self._is_of_samples(value) for value in (layer.inputs[0], layer.outputs[0])):
            return "what goes into it and comes out is not known to be one of each sample"
        return None

    def multiply(self, layers: Sequence[ir.Node], factors: Array) -> None:
        """Let ``layers``, which read one value, read it times the factors of its samples' rows, and nobody else."""
        value, name = layers[0].inputs[0], f"{scope(layers[0])}.aligned"
        assert value is not None
        if value.is_graph_output() or any(user not in layers for user in value.consumers()):
            product = self._product(value, factors, name)
            for layer in layers:
                layer.replace_input_with(0, product)
            return
        places = [value, *self._upstream(value)]
        for place in places:
            if self._into_operands(place, factors, name):
                return
        # One of the ends: within an attention a product would keep runtimes from seeing one.
        smallest = min(value, places[-1], key=_elements)
        replaced = list(smallest.uses())
        product = self._product(smallest, factors, name)
        for user, index in replaced:
            user.replace_input_with(index, product)

    def divide(self, layer: ir.Node, factors: Array) -> None:
        """Divide what ``layer`` computes by the factors of its samples' rows, but for its bias."""
        output, inverse, name = layer.outputs[0], 1 / factors, f"{scope(layer)}.restored"
        bias = layer.inputs[2] if len(layer.inputs) > 2 else None
        if bias is None and self._into_product(output, inverse, name):
            return
        divided = ir.Value(name=f"{name}/Mul.0", shape=output.shape, type=output.type)
        shifted = ir.Value(name=f"{name}/Add.0", shape=output.shape, type=output.type)
        replace_value(output, divided if bias is None else shifted)
        nodes = [ir.node("Mul", [output, self._factor(output, inverse, name)], outputs=[divided], name=f"{name}/Mul")]
        if bias is not None:
            layer.resize_inputs(2)
            nodes.append(ir.node("Add", [divided, self._bias(layer, bias)], outputs=[shifted], name=f"{name}/Add"))
        self._graph.graph.insert_after(layer, nodes)

    def _is_of_samples(self, value: ir.Value | None) -> bool:
        shape = value.shape if value is not None else None
        return shape is not None and len(shape) > 0 and self._batch is not None and shape[0] == self._batch

    def _upstream(self, value: ir.Value) -> Iterator[ir.Value]:
        """Values that only ``value`` is computed from, and of which a multiple gives the same multiple of it."""
        while (source := self._moved(value)) is not None:
            if len(source.uses()) != 1 or source.is_graph_output() or constant_tensor(source) is not None:
                return
            if self._is_of_samples(source):
                yield source
            value = source

    def _moved(self, value: ir.Value) -> ir.Value | None:
        """What ``value`` is a rearrangement of, or the values that attention adds up in it."""
        node = value.producer()
        if node is None:
            return None
        if node.op_type in _MOVES:
            return node.inputs[0] if self._keeps_samples(node) else None
        if node.op_type == "MatMul" and produced_by(node.inputs[0], "Softmax") is not None:
            return node.inputs[1] if self._is_of_samples(node.inputs[1]) else None
        return None

    def _keeps_samples(self, node: ir.Node) -> bool:
        """A Reshape keeps the order of numbers; a Transpose has to leave the first dimension, that of whole samples."""
        if node.op_type == "Reshape":
            return True
        source, order = node.inputs[0], attribute(node, "perm", (None,))
        if source is None or source.shape is None or order[0] != 0:
            return False
        first, batch = source.shape[0], self._batch
        if isinstance(first, int) and isinstance(batch, int):
            return first % batch == 0
        return isinstance(first, ir.SymbolicDim) and times_batch(first.value) is not None

    def _into_operands(self, value: ir.Value, factors: Array, name: str) -> bool:
        """Put the factors into the tables or constants that ``value`` is made with, if it is."""
        node = value.producer()
        if node is None or not self._is_of_samples(value):
            return False
        if node.op_type == "Mul":
            return self._into_operand(node, factors, name) or any(
                len(operand.uses()) == 1 and self._into_operands(operand, factors, name)
                for operand in node.inputs
                if operand is not None
            )
        if node.op_type != "Add":
            return False
        for index in (0, 1):
            product = produced_by(node.inputs[1 - index], "Mul")
            alone = product is not None and len(product.outputs[0].uses()) == 1
            if product is None or not alone or self._rows(node, index) is None:
                continue
            if self._into_operands(product.outputs[0], factors, f"{name}.scale"):
                self._replace_operand(node, index, factors, f"{name}.shift")
                return True
        return False

    def _into_product(self, value: ir.Value, factors: Array, name: str) -> bool:
        """Put the factors into a table or constant that ``value`` is multiplied by further down, if it is."""
        while len(value.uses()) == 1 and not value.is_graph_output():
            (user,) = value.consumers()
            if user.op_type == "Mul":
                return self._is_of_samples(user.outputs[0]) and self._into_operand(user, factors, name)
            if user.op_type not in _MOVES or user.inputs[0] is not value or not self._keeps_samples(user):
                return False
            value = user.outputs[0]
        return False

    def _into_operand(self, node: ir.Node, factors: Array, name: str) -> bool:
        for index in (0, 1):
            if self._rows(node, index) is not None:
                self._replace_operand(node, index, factors, name)
                return True
        return False

    def _replace_operand(self, node: ir.Node, index: int, factors: Array, name: str) -> None:
        rows = self._rows(node, index)
        assert rows is not None
        scaled = rows.astype(np.float64) * factors.reshape(-1, *[1] * (rows.ndim - 1))
        node.replace_input_with(index, self._table(scaled.astype(rows.dtype), name))

    def _rows(self, node: ir.Node, index: int) -> NDArray[np.generic] | None:
        """An operand of a binary node as rows of the result's rank, one of each task; or one for all."""
        operand, result = node.inputs[index], node.outputs[0]
        assert result.shape is not None
        rank = len(result.shape)
        if (fixed := constant_tensor(operand)) is not None:
            shape = tuple(fixed.shape.numpy())
            if len(shape) > rank or math.prod(shape) != max((1, *shape)) or (len(shape) == rank and shape[0] != 1):
                return None
            array = fixed.numpy()
            return array.reshape(*[1] * (rank - array.ndim), *array.shape)
        gather = produced_by(operand, "Gather")
        if gather is None or attribute(gather, "axis", 0) != 0:
            return None
        rows, row = constant(gather.inputs[0]), gather.inputs[1]
        return rows if rows is not None and rows.ndim == rank and row is not None and row is self._task else None

    def _product(self, value: ir.Value, factors: Array, name: str) -> ir.Value:
        factor = self._factor(value, factors, name)
        product = ir.node("Mul", [value, factor], name=f"{name}/Mul")
        (result,) = product.outputs
        result.name, result.shape, result.type = f"{name}/Mul.0", value.shape, value.type
        last = value.producer() or factor.producer()  # of a graph input and a row of a table: these stand in front
        if last is not None:
            self._graph.graph.insert_after(last, product)
        else:
            self._graph.graph.insert_before(self._graph.graph[0], product)
        return result

    def _factor(self, value: ir.Value, factors: Array, name: str) -> ir.Value:
        assert value.shape is not None and value.dtype is not None
        shape = (-1, *[1] * (len(value.shape) - 1))
        return self._table(factors.reshape(shape).astype(value.dtype.numpy()), name)

    def _table(self, rows: NDArray[np.generic], name: str) -> ir.Value:
        """Equal tables are one."""
        key = (rows.tobytes(), rows.shape)
        if key not in self._tables:
            assert self._task is not None
            self._tables[key] = add_table(self._graph, name, rows, self._task)
        return self._tables[key]

    def _bias(self, layer: ir.Node, bias: ir.Value) -> ir.Value:
        """The bias of a convolution as an operand of Add; that of a Gemm is one."""
        assert layer.outputs[0].shape is not None
        if layer.op_type != "Conv":
            return bias
        array = constant(bias)
        assert array is not None
        spatial = len(layer.outputs[0].shape) - 2
        return add_constant(self._graph, f"{bias.name}.aligned", array.reshape(1, -1, *[1] * spatial))


def _elements(value: ir.Value) -> int:
    """Of each sample; what is unknown counts most."""
    sizes = () if value.shape is None else tuple(value.shape)[1:]
    known = [size for size in sizes if isinstance(size, int)]
    return math.prod(known) if value.shape is not None and len(known) == len(sizes) else 1 << 62
