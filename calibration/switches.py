"""One graph in which every quantised layer can be switched between float and INT8, layer by layer.

Measuring what a layer costs in accuracy takes one run with only that layer in INT8. Hundreds of such graphs would have
to be written and opened; here there is one, made of a float graph and its Q/DQ twin:

    Given:   x → Conv(w) → y                            (float)
             x → Q → DQ → Conv(DQ(w8)) → y              (its INT8 twin)
    Result:  x → If(switch) { Q → DQ → Conv(DQ(w8)) | Conv(w) } → y

``If`` runs one branch and leaves the other alone, so a switch that is off costs nothing.

Layers that read one quantiser (query, key and value) share a switch: quantising one of them alone saves nothing.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibration.parts import Part, split
from mtu_compile.core.errors import PassError
from mtu_compile.graph import io as graph_io
from mtu_compile.graph import qdq

if TYPE_CHECKING:
    import onnx_ir as ir

Array = NDArray[Any]
Feed = Mapping[str, Array]
T = TypeVar("T")

#: The graph input that holds the switches, [number of units] bool.
SWITCHES = "mtu_switches"

#: How many parts the graph is cut into: more would save little, a run begins in the middle of the network on average.
PARTS = 8

#: Prefix of what comes from the INT8 graph.
INT8 = "mtu_int8/"


@dataclass(frozen=True)
class Unit:
    """Layers that become INT8 together, because they read one quantiser.

    Attributes:
        name: of the first of them.
        members: node names of all of them, in graph order.
        op_type: of the first (``"Conv"``, ``"Gemm"``, ``"MatMul"``).
    """

    name: str
    members: tuple[str, ...]
    op_type: str


class SwitchedGraph:
    """The graph, opened in ONNX Runtime. A context manager: the graph lies in a temporary folder."""

    def __init__(
        self, float_graph: Path, int8_graph: Path, *, folder: Path | None = None, parallel: bool = False
    ) -> None:
        """Join the two graphs.

        Args:
            float_graph: static, float32.
            int8_graph: its quantised twin, with the same node names (``quantize_onnx``, perhaps legalised).
            folder: for the temporary files; the system's own otherwise.
            parallel: run as many inferences at a time as there are cores, each on one (see ``run_all``). A small
                network gains by that; a large one keeps all cores busy by itself, and needs its memory but once.

        Raises:
            ModelError: one of them is unreadable.
            PassError: they do not belong together, or nothing is quantised.
        """
        model, self.units = join(float_graph, int8_graph)
        starts = _starts(model, self.units)
        parts = split(model, [start for i, start in enumerate(starts) if start not in starts[:i]])
        places = {node.name: i for i, part in enumerate(parts) for node in part.model.graph}
        self._first = [places[start.name] for start in starts]
        self._output = str(model.graph.outputs[0].name)
        self._workers = _cores() if parallel else 1
        self._scratch = tempfile.TemporaryDirectory(dir=folder, prefix="mtu-switches-")
        try:
            self._parts = [
                _Opened(part, Path(self._scratch.name) / f"{i}.onnx", threads=1 if self._workers > 1 else 0)
                for i, part in enumerate(parts)
            ]
        except BaseException:
            self._scratch.cleanup()
            raise

    def __enter__(self) -> SwitchedGraph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._parts
        self._scratch.cleanup()

    def run(self, feed: Feed, int8: Collection[str] = ()) -> Array:
        """The graph's first output with the units named in ``int8`` quantised and all others in float32."""
        return self._run(feed, int8, self._parts)

    def run_all(self, feeds: Iterable[Feed], int8: Collection[str] = ()) -> Iterator[Array]:
        """What ``run`` returns for each of ``feeds``, in their order."""
        yield from self._map(lambda feed: self.run(feed, int8), feeds)

    def run_each(self, feed: Feed) -> Iterator[Array]:
        """What ``run`` returns with each of the units quantised alone, in their order.

        Faster than as many runs, because what comes before a unit's part is run only once.
        """
        before: list[Feed] = [feed]
        for part in self._parts[:-1]:
            before.append({**before[-1], **part.run({**before[-1], SWITCHES: self._switches(())})})

        def alone(index: int) -> Array:
            first = self._first[index]
            return self._run(before[first], (self.units[index].name,), self._parts[first:])

        yield from self._map(alone, range(len(self.units)))

    def _run(self, feed: Feed, int8: Collection[str], parts: Sequence[_Opened]) -> Array:
        values = {**feed, SWITCHES: self._switches(int8)}
        for part in parts:
            values |= part.run(values)
        return values[self._output]

    def _switches(self, int8: Collection[str]) -> Array:
        return np.array([unit.name in int8 for unit in self.units])

    def _map(self, function: Callable[[T], Array], over: Iterable[T]) -> Iterator[Array]:
        if self._workers == 1:
            yield from map(function, over)
            return
        with ThreadPoolExecutor(self._workers) as pool:
            yield from pool.map(function, over)


class _Opened:
    """A part of the graph in ONNX Runtime."""

    def __init__(self, part: Part, path: Path, *, threads: int) -> None:
        import onnxruntime as ort

        self._part = part
        graph_io.save(part.model, path)
        options = ort.SessionOptions()
        # Optimisations would fuse what has to stay apart, and compute constants of branches that never run.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        # Threads of a part that is done would go on waiting for work, and take it from the next part's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])

    def run(self, values: Feed) -> dict[str, Array]:
        """What the part makes of ``values``, by name; those it does not read are left alone."""
        outputs = self._part.outputs
        found = self._session.run(list(outputs), {name: values[name] for name in self._part.inputs})
        return dict(zip(outputs, found, strict=True))


def join(float_graph: Path, int8_graph: Path) -> tuple[ir.Model, tuple[Unit, ...]]:
    """The switched graph and its units, in graph order (see ``SwitchedGraph``)."""
    import onnx_ir as ir

    model, int8 = graph_io.load(float_graph), graph_io.load(int8_graph)
    twins = {node.name: node for node in int8.graph if node.op_type in qdq.LAYERS}
    units = find_units(int8)
    if not units:
        raise PassError(f"{int8_graph.name} has no quantised layer")
    place = {name: i for i, unit in enumerate(units) for name in unit.members}
    layers = {node.name: node for node in model.graph if node.op_type in qdq.LAYERS}
    if missing := sorted(set(place) - set(layers)):
        raise PassError(f"{float_graph.name} has no layer called {missing[0]!r}", hint="quantise it again")
    switches = ir.Value(name=SWITCHES, shape=ir.Shape([len(units)]), type=ir.TensorType(ir.DataType.BOOL))
    model.graph.inputs.append(switches)
    known = {value.name: value for node in model.graph for value in node.outputs}
    known |= {value.name: value for value in model.graph.inputs}
    for name, index in place.items():
        _switch(model, layers[name], twins[name], index, switches, known)
    graph_io.check(model, "calibration.switches")
    return model, units


def find_units(int8: ir.Model) -> tuple[Unit, ...]:
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
    units = [sorted(group, key=order.__getitem__) for group in members if group]
    named = [tuple(str(node.name) for node in group) for group in units]
    return tuple(Unit(names[0], names, group[0].op_type) for names, group in zip(named, units, strict=True))


def _starts(model: ir.Model, units: Sequence[Unit]) -> list[ir.Node]:
    """For each unit the node, one of ``PARTS``, that a run may begin with if only this unit differs."""
    place = {name: i for i, unit in enumerate(units) for name in unit.members}
    switches = {f"{INT8}{name}/switch": i for name, i in place.items()}
    first: dict[int, ir.Node] = {}
    for node in model.graph:
        if node.name in switches:
            first.setdefault(switches[node.name], node)
    # Units are in the order of their first members.
    every = -(-len(units) // PARTS)
    return [first[i - i % every] for i in range(len(units))]


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
    number = ir.tensor(np.array(index, np.int64), name=f"{INT8}{layer.name}/index")
    place = ir.Value(name=number.name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64), const_value=number)
    model.graph.register_initializer(place)
    condition = ir.Node("", "Gather", [switches, place], name=f"{INT8}{layer.name}/switch")
    condition.outputs[0].name = f"{INT8}{layer.name}/on"
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
        stem = f"{INT8}{twin.name}/{node.name or node.outputs[0].name}"
        made = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), name=stem)
        old, new = node.outputs[0], made.outputs[0]
        new.name, new.shape, new.type = f"{INT8}{twin.name}/{old.name}", old.shape, old.type
        nodes.append(made)
        return new

    output = copy_node(twin, quantised=True)
    if correction is not None:
        shift = ir.Value(name=correction.name, type=ir.TensorType(correction.dtype))
        shift.shape = ir.Shape(correction.shape.numpy())
        shift.const_value = correction
        model.graph.register_initializer(shift)
        corrected = ir.Node("", "Add", [output, shift], name=f"{INT8}{twin.name}/correction")
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
        found = [tensor for tensor in tensors if tensor is not None]
        if len(found) != 1:
            return None
        biases.append(found[0].numpy())
    shift = biases[1] - biases[0]
    return ir.tensor(shift, name=f"{INT8}{twin.name}/shift") if np.any(shift) else None


def _constant(model: ir.Model, value: ir.Value) -> ir.Value:
    """An initialiser of the INT8 graph in ``model``, under a name of its own."""
    import onnx_ir as ir

    name = f"{INT8}{value.name}"
    found = model.graph.initializers.get(name)
    if found is None:
        found = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        model.graph.register_initializer(found)
    return found


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
