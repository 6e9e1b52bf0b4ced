"""A UNet cut behind its deep part: one graph that gives the deep feature as well, and a shallow one that takes it.

The deep feature is the hidden state that enters the last layer of the last up block, before the skip connection is
concatenated to it. All behind it, and the few layers that make that skip connection, are the shallow graph. Both cuts
are made in copies of one lowered graph, so weights, scales and roundings are the same in both. After Ma et al.,
"DeepCache: Accelerating Diffusion Models for Free", CVPR 2024 (arXiv:2312.00858).
"""

from __future__ import annotations

import re

import onnx_ir as ir

from mtu_compile.core.errors import PassError
from mtu_compile.graph.edit import ancestors, find_input, remove_unused, replace_value
from mtu_compile.runtime.step_cache import DEEP
from passes.base import TASK_PIPELINE, PassContext, PassResult

#: Where the exporter leaves the concatenation of a skip connection: in the up block itself, not in a layer of it.
_SKIP = re.compile(r"up_blocks\.(\d+)/Concat(?:_(\d+))?")

#: Passes that leave the graph as it is compiled: the cut comes behind all of them.
_LOWERING = ("mtu::align-ranges", "mtu::legalise-qdq", "mtu::uint8-activations", "mtu::fit-int16-sums")
_HALF = ("mtu::to-fp16", "mtu::to-bf16")


class EmitDeepFeature:
    """Give the deep feature as a second output.

    *Given*::

        deep = Add(…); joined = Concat(deep, skip); …; out_sample = Conv(…)

    *Result*::

        deep = Add(…); joined = Concat(deep, skip); …; out_sample = Conv(…)      # outputs: out_sample, deep_feature

    In float32 whatever type the graph works in: a Cast is added where ``deep`` is of another. Where ``deep`` is
    quantised on its way into the concatenation it is given as it was before. Does not fire on a graph that has the
    output. Refuses (``PassError``) a graph without a skip connection into an up block, and one whose deep feature is
    all that its output depends on, or needs nothing of the sample: caching it would skip everything, or nothing.
    """

    id = "mtu::emit-deep-feature"
    after: tuple[str, ...] = (*TASK_PIPELINE, *_LOWERING, *_HALF)

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        _require_cut(graph)

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        if _is_output(graph):
            return PassResult(self.id, graph, 0)
        value = deep_value(graph)
        if value.dtype != ir.DataType.FLOAT:
            node = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT.value}, name=f"{DEEP}/Cast")
            graph.graph.append(node)
            shape, value = value.shape, node.outputs[0]
            value.shape, value.type = shape, ir.TensorType(ir.DataType.FLOAT)
            value.name = DEEP
        else:
            node = ir.node("Identity", [value], name=f"{DEEP}/Identity")
            graph.graph.append(node)
            node.outputs[0].shape, node.outputs[0].type, node.outputs[0].name = value.shape, value.type, DEEP
            value = node.outputs[0]
        graph.graph.outputs.append(value)
        return PassResult(self.id, graph, 1)

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        if not _is_output(graph):
            raise PassError(f"{self.id} left the graph without an output {DEEP!r}")


class TakeDeepFeature:
    """Take the deep feature as an input, and drop what computed it.

    *Given*::

        deep = Add(…); joined = Concat(deep, skip); …; out_sample = Conv(…)

    *Result*::

        joined = Concat(deep_feature, skip); …; out_sample = Conv(…)             # inputs: …, deep_feature

    Inputs that nothing reads any more go, too. The rest is ``EmitDeepFeature``'s: float32, before quantisation. Does
    not fire on a graph that has the input. Refuses (``PassError``) what that refuses, and a graph in which something
    deep is left: another skip connection reaches the output past the cut.
    """

    id = "mtu::take-deep-feature"
    after: tuple[str, ...] = (*TASK_PIPELINE, *_LOWERING, *_HALF)

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        if find_input(graph, DEEP) is None:
            _require_cut(graph)

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        if find_input(graph, DEEP) is not None:
            return PassResult(self.id, graph, 0)
        for output in [one for one in graph.graph.outputs if one.name == DEEP]:
            graph.graph.outputs.remove(output)
            output.name = f"{DEEP}.given"
        value, before = deep_value(graph), len(graph.graph)
        given = ir.Value(name=DEEP, shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
        taken, dtype = given, value.dtype
        if dtype != ir.DataType.FLOAT:
            assert dtype is not None
            node = ir.node("Cast", [given], attributes={"to": dtype.value}, name=f"{DEEP}/Cast")
            producer = value.producer()
            assert producer is not None
            graph.graph.insert_after(producer, node)
            taken = node.outputs[0]
            taken.shape, taken.type, taken.name = value.shape, ir.TensorType(dtype), f"{DEEP}.cast"
        graph.graph.inputs.append(given)
        replace_value(value, taken)
        remove_unused(graph)
        for unused in [one for one in graph.graph.inputs if not one.uses()]:
            graph.graph.inputs.remove(unused)
        return PassResult(self.id, graph, before - len(graph.graph))

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        if find_input(graph, DEEP) is None:
            raise PassError(f"{self.id} left the graph without an input {DEEP!r}")
        if len(skips := _skips(graph)) != 1:
            names = ", ".join(str(node.name) for node in skips)
            raise PassError(f"the graph behind the deep feature still has the skip connections {names}")


def deep_value(graph: ir.Model) -> ir.Value:
    """The deep feature of a graph, before it is quantised on its way into the last concatenation.

    Raises:
        PassError: there is no skip connection into an up block.
    """
    skips = _skips(graph)
    if not skips:
        raise PassError(
            "the UNet has no skip connection into an up block: it cannot be cut into a deep and a shallow part",
            hint="build without --step-cache",
        )
    value = skips[-1].inputs[0]
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("DequantizeLinear", "QuantizeLinear", "Cast"):
            break
        value = node.inputs[0]
    assert value is not None
    if value.shape is None or value.dtype is None:
        raise PassError(f"value {value.name!r}, the deep feature, has no known shape")
    return value


def _skips(graph: ir.Model) -> list[ir.Node]:
    """The concatenations of skip connections, in the order of the layers they are for."""
    found = {}
    for node in graph.graph:
        if node.op_type == "Concat" and (place := _SKIP.fullmatch(node.name or "")) is not None:
            found[int(place[1]), int(place[2] or 0)] = node
    return [found[key] for key in sorted(found)]


def _is_output(graph: ir.Model) -> bool:
    return any(value.name == DEEP for value in graph.graph.outputs)


def _require_cut(graph: ir.Model) -> None:
    """``PassError`` unless the deep feature depends on the sample, and the output not on it alone."""
    value = deep_value(graph)
    if value.is_graph_input():
        raise PassError(f"{value.name!r}, the deep feature, is an input of the graph already")
    if not any(one.is_graph_input() for one in ancestors((value,))):
        raise PassError(f"value {value.name!r}, the deep feature, depends on no input: there is nothing to skip")
