"""A graph cut into segments that run one after the other.

Where many runs differ only from some layer on, what comes before that layer need not run again: its results are kept,
and the runs begin at the segment the layer is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Segment:
    """Nodes of a graph that stand next to each other, as a graph of their own.

    Attributes:
        model: the graph.
        inputs: names of what it reads: inputs of the whole graph, and results of earlier segments.
        outputs: names of what it makes and later segments read, or is the whole graph's output.
    """

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut(model: ir.Model, starts: Sequence[ir.Node]) -> tuple[Segment, ...]:
    """Cut ``model``, whose nodes are in topological order, before each of ``starts``.

    Weights are not copied, but shared between the model and its segments.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(model)  # inputs of a graph have to say what type they are
    segment_of: dict[ir.Node, int] = {}
    index, remaining = 0, set(starts)
    for i, node in enumerate(model.graph):
        index += i > 0 and node in remaining
        segment_of[node] = index
    reads: list[dict[ir.Value, None]] = [{} for _ in range(index + 1)]
    needed: list[dict[ir.Value, None]] = [{} for _ in range(index + 1)]
    for node, segment in segment_of.items():
        for value in _read(node):
            maker = value.producer()
            if maker is None and value.is_graph_input():
                reads[segment][value] = None
            elif maker in segment_of and segment_of[maker] != segment:
                reads[segment][value] = None
                needed[segment_of[maker]][value] = None
    for value in model.graph.outputs:
        maker = value.producer()
        if maker is not None:
            needed[segment_of[maker]][value] = None
    segments = []
    for inputs, outputs in zip(reads, needed, strict=True):
        graph = ir.convenience.extract(model.graph, list(inputs), list(outputs))
        names = tuple(str(value.name) for value in inputs), tuple(str(value.name) for value in outputs)
        segments.append(Segment(ir.Model(graph, ir_version=model.ir_version), *names))
    return tuple(segments)


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """Values a node reads, and those that the graphs inside it (of an ``If``) read from around them."""
    import onnx_ir as ir

    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                yield from _read(inner)
