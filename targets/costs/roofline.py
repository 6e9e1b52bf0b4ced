"""Cost of every layer by the operations it takes and the bytes it moves, for a device that is not here."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtu_compile.core.errors import ModelError
from targets.base import LayerCosts, Precision
from targets.costs.estimate import FLOAT_BYTES, infer_missing_shapes
from targets.costs.layers import read_layers

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Speed:
    """The most a device can do, by its data sheet.

    Attributes:
        device: what the figures are of.
        half_tflops: dense fp16 matrix products, in 10¹² operations (two for each multiply-add) a second.
        int8_tops: dense INT8 (and FP8) ones.
        gb_per_s: of its memory, in 10⁹ bytes a second.
        source: where the figures stand.
    """

    device: str
    half_tflops: float
    int8_tops: float
    gb_per_s: float
    source: str

    def product_ms(self, operations: float, moved: float, *, quantised: bool, width: int) -> float:
        """Milliseconds of a layer: its operations or its traffic, whichever takes longer (the roofline model).

        Args:
            operations: two for each multiply-add.
            moved: bytes read and written.
            quantised: it runs on integers (or FP8).
            width: bytes of the float type; float32 is taken to run at half the speed of fp16.
        """
        rate = self.int8_tops if quantised else self.half_tflops * 2 / width
        return max(operations / (rate * 1e9), self.moving_ms(moved))

    def moving_ms(self, moved: float) -> float:
        """Milliseconds to read or write so many bytes."""
        return moved / (self.gb_per_s * 1e6)


def estimate_costs(graph: Path, speed: Speed, *, precision: Precision, rest: Precision) -> LayerCosts:
    """Cost of every layer of a static graph as it is built in ``precision``.

    A layer costs what its multiply-adds take at the peak, or what reading its operands and writing its result takes,
    whichever is more; and its share of the quantisers in front of it, each taken to be a kernel of its own that reads
    the float type and writes a byte. Compilers fuse some of those, so quantised layers are rather faster than this.
    What is no layer costs nothing here.

    Raises:
        ModelError: ``graph`` is unreadable, has no layers, or a layer is of unknown shape.
    """
    from mtu_compile.graph import io as graph_io
    from mtu_compile.graph.qdq import activation_quantisers, is_dequantised

    layers = read_layers(graph)
    model = graph_io.load(graph)
    infer_missing_shapes(model)
    width = FLOAT_BYTES.get(precision, FLOAT_BYTES[rest])
    wanted = set(layers.names)
    nodes = [node for node in model.graph if node.name in wanted]
    sources = {node: [q for value in node.inputs[:2] for q in activation_quantisers(value)] for node in nodes}
    readers = Counter(q for found in sources.values() for q in dict.fromkeys(found))
    costs = {}
    for node in nodes:
        operands = [value for value in node.inputs[:2] if value is not None]
        quantised = all(is_dequantised(value) for value in operands)
        moved = sum(_elements(value) * (1 if is_dequantised(value) else width) for value in operands)
        moved += _elements(node.outputs[0]) * width
        spent = speed.product_ms(2.0 * _multiply_adds(node), moved, quantised=quantised, width=width)
        for q in dict.fromkeys(sources[node]):
            spent += speed.moving_ms(_elements(q.outputs[0]) * (width + 1)) / readers[q]
        costs[node.name or ""] = spent
    source = f"estimate from operations and bytes: {speed.device} at its peak; not measured"
    return LayerCosts(costs, math.fsum(costs.values()), source, False)


def multiply_adds(model: ir.Model) -> tuple[int, ...]:
    """How many products of two numbers each layer of a static graph sums up.

    Args:
        model: shapes that are missing are inferred, which changes it.

    Raises:
        ModelError: a layer is of unknown shape.
    """
    from mtu_compile.graph.qdq import LAYERS

    infer_missing_shapes(model)
    return tuple(_multiply_adds(node) for node in model.graph if node.op_type in LAYERS)


def _multiply_adds(node: ir.Node) -> int:
    """How many products of two numbers a layer sums up."""
    weight = node.inputs[1]
    shape = weight.shape.numpy() if weight is not None and weight.shape is not None else ()
    if node.op_type == "Conv":  # [out, in / groups, *kernel]
        return _elements(node.outputs[0]) * math.prod(shape[1:])
    depth = shape[-1] if node.attributes.get_int("transB", 0) else shape[-2 if len(shape) > 1 else 0]
    return _elements(node.outputs[0]) * depth


def _elements(value: ir.Value) -> int:
    if value.shape is None or not value.shape.is_static():
        raise ModelError(f"the shape of {value.name!r} is not known", hint="freeze the shapes first")
    return math.prod(value.shape.numpy())
