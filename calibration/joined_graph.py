"""A float graph and its INT8 twin joined into one, in which each group of layers can be switched between the two.

    Given:   x → Conv(w) → y                            (float)
             x → Q → DQ → Conv(DQ(w8)) → y              (its INT8 twin)
    Result:  x → If(switch) { Q → DQ → Conv(DQ(w8)) | Conv(w) } → y

``If`` runs one branch and leaves the other alone, so a switch that is off costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.layer_groups import LayerGroup, find_groups
from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq

if TYPE_CHECKING:
    import onnx_ir as ir

#: The graph input that holds the switches, [number of groups] bool.
SWITCHES = "mtu_switches"

#: Before the names of what comes from the INT8 graph.
TWIN = "mtu_int8/"


def join(float_graph: Path, int8_graph: Path) -> tuple[ir.Model, tuple[LayerGroup, ...]]:
    """The switched graph and its groups, in graph order (see ``SwitchedGraph``)."""
    import onnx_ir as ir

    model, int8 = graph_io.load(float_graph), graph_io.load(int8_graph)
    twins = {node.name: node for node in int8.graph if node.op_type in qdq.LAYERS}
    groups = find_groups(int8)
    if not groups:
        raise PassError(f"{int8_graph.name} has no quantised layer")
    place = {name: i for i, group in enumerate(groups) for name in group.members}
    layers = {node.name: node for node in model.graph if node.op_type in qdq.LAYERS}
    if missing := sorted(set(place) - set(layers)):
        raise PassError(f"{float_graph.name} has no layer called {missing[0]!r}", hint="quantise it again")
    switches = ir.Value(name=SWITCHES, shape=ir.Shape([len(groups)]), type=ir.TensorType(ir.DataType.BOOL))
    model.graph.inputs.append(switches)
    known = {value.name: value for node in model.graph for value in node.outputs}
    known |= {value.name: value for value in model.graph.inputs}
    for name, index in place.items():
        _switch(model, layers[name], twins[name], index, switches, known)
    graph_io.check(model, "calibration.joined_graph")
    return model, groups


def _switch(
    model: ir.Model, layer: ir.Node, twin: ir.Node, index: int, switches: ir.Value, known: dict[str | None, ir.Value]
) -> None:
    """Put ``layer`` of ``model`` and its ``twin`` into the branches of an ``If``."""
    import onnx_ir as ir

    output = layer.outputs[0]
    correction = _bias_correction(layer, twin)
    inner = ir.Value(name=f"{output.name}/float", shape=output.shape, type=output.type)
    plain = ir.Node(
        layer.domain,
        layer.op_type,
        layer.inputs,
        layer.attributes.values(),
        outputs=[inner],
        name=f"{layer.name}/float",
    )
    number = ir.tensor(np.array(index, np.int64), name=f"{TWIN}{layer.name}/index")
    place = ir.Value(name=number.name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64), const_value=number)
    model.graph.register_initializer(place)
    condition = ir.Node("", "Gather", [switches, place], name=f"{TWIN}{layer.name}/switch")
    condition.outputs[0].name = f"{TWIN}{layer.name}/on"
    chosen = ir.Node(
        "",
        "If",
        [condition.outputs[0]],
        [
            ir.AttrGraph("then_branch", _quantised_branch(model, twin, known, correction)),
            ir.AttrGraph("else_branch", ir.Graph([], [inner], nodes=[plain], name=f"{layer.name}/else")),
        ],
        name=f"{layer.name}/choice",
    )
    chosen.outputs[0].shape, chosen.outputs[0].type = output.shape, output.type
    model.graph.insert_before(layer, [condition, chosen])
    is_output = output.is_graph_output()
    output.replace_all_uses_with(chosen.outputs[0], replace_graph_outputs=is_output)
    model.graph.remove(layer, safe=True)
    chosen.outputs[0].name = output.name
    known[output.name] = chosen.outputs[0]


def _quantised_branch(
    model: ir.Model, twin: ir.Node, known: Mapping[str | None, ir.Value], correction: ir.TensorProtocol | None
) -> ir.Graph:
    """A copy of what quantises ``twin``'s inputs, and of ``twin``; it reads the float activations of ``model``."""
    import onnx_ir as ir

    nodes: list[ir.Node] = []
    copies: dict[ir.Value, ir.Value | None] = {}

    def copy(value: ir.Value | None, *, quantised: bool) -> ir.Value | None:
        if value is None:
            return None
        if value in copies:
            return copies[value]
        producer = value.producer()
        if qdq.constant(value) is not None:
            copies[value] = _constant(model, value)
        elif producer is None or (not quantised and value.name in known):
            if value.name not in known:
                raise PassError(f"the float graph has no value {value.name!r}", hint="quantise it again")
            copies[value] = known[value.name]
        else:
            copies[value] = copy_node(producer, quantised=quantised and producer.op_type != "QuantizeLinear")
        return copies[value]

    def copy_node(node: ir.Node, *, quantised: bool) -> ir.Value:
        moves = node.op_type in (*qdq.TRANSPARENT, "DequantizeLinear")
        if node is twin:
            inputs = [copy(value, quantised=qdq.is_dequantised(value)) for value in node.inputs]
        else:
            inputs = [copy(value, quantised=quantised and moves) for value in node.inputs]
        stem = f"{TWIN}{twin.name}/{node.name or node.outputs[0].name}"
        twin_node = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), name=stem)
        old, new = node.outputs[0], twin_node.outputs[0]
        new.name, new.shape, new.type = f"{TWIN}{twin.name}/{old.name}", old.shape, old.type
        nodes.append(twin_node)
        return new

    output = copy_node(twin, quantised=True)
    if correction is not None:
        shift = ir.Value(name=correction.name, type=ir.TensorType(correction.dtype))
        shift.shape = ir.Shape(correction.shape.numpy())
        shift.const_value = correction
        model.graph.register_initializer(shift)
        corrected = ir.Node("", "Add", [output, shift], name=f"{TWIN}{twin.name}/correction")
        nodes.append(corrected)
        corrected.outputs[0].name, corrected.outputs[0].type = f"{output.name}/corrected", output.type
        corrected.outputs[0].shape, output = output.shape, corrected.outputs[0]
    return ir.Graph([], [output], nodes=nodes, name=f"{twin.name}/then")


def _bias_correction(layer: ir.Node, twin: ir.Node) -> ir.TensorProtocol | None:
    """What bias correction added to the bias in the ``Add`` behind a MatMul, which is not part of the layer's node."""
    import onnx_ir as ir

    biases = []
    for node in (layer, twin):
        users = [user for user in node.outputs[0].consumers() if user.op_type == "Add"]
        tensors = [qdq.constant(value) for user in users for value in user.inputs]
        constants = [tensor for tensor in tensors if tensor is not None]
        if len(constants) != 1:
            return None
        biases.append(constants[0].numpy())
    shift = biases[1] - biases[0]
    return ir.tensor(shift, name=f"{TWIN}{twin.name}/shift") if np.any(shift) else None


def _constant(model: ir.Model, value: ir.Value) -> ir.Value:
    """An initialiser of the INT8 graph in ``model``, under a name of its own."""
    import onnx_ir as ir

    name = f"{TWIN}{value.name}"
    copied = model.graph.initializers.get(name)
    if copied is None:
        copied = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        model.graph.register_initializer(copied)
    return copied
