"""What each layer of a graph costs on a device: whose time a kernel's time is, and float against quantised.

Compilers fuse, split and add nodes; what they report is the time of their own kernels. Here kernels are mapped back to
the layers (Conv, Gemm, MatMul) of the ONNX graph they were made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtu_compile.core.errors import ModelError
from targets.base import COST_ROUNDS, LayerCosts, Precision, Target, require_graph

if TYPE_CHECKING:
    import onnx_ir as ir

#: A quantised layer counts as slower beyond these differences; both have to be exceeded. Measured three times on a busy
#: machine, nine in ten differences of the example's layers repeated within 14 to 21 % of the float time, half of them
#: within 3 µs; of the layers found slower two in three or more were the same every time (OpenVINO 2026.4.1, CPU).
SLOWER_SHARE, SLOWER_MS = 0.15, 0.004


@dataclass(frozen=True)
class Layers:
    """The layers of an ONNX graph, and by which names a compiler may know them.

    Attributes:
        names: of the Conv, Gemm and MatMul nodes, in graph order.
        owner: by node name, the layer it is, or whose bias it adds: compilers call a product with a bias by either.
        nodes: names of all nodes, and other names in ``owner``.
    """

    names: tuple[str, ...]
    owner: Mapping[str, str]
    nodes: frozenset[str]

    def of(self, originals: Iterable[str]) -> tuple[str, ...]:
        """The layers that ``originals`` name, each once.

        What a compiler makes of one node it calls by the node's name and a suffix ("conv/WithoutBiases").
        """
        return tuple(dict.fromkeys(layer for name in originals if (layer := self._owner(name)) is not None))

    def _owner(self, name: str) -> str | None:
        while name not in self.nodes:
            name, cut, _ = name.rpartition("/")
            if not cut:
                return None
        return self.owner.get(name)


def read_layers(graph: Path) -> Layers:
    """The layers of an ONNX file.

    Raises:
        ModelError: it is not one, or has layers without a name, or none at all.
    """
    from mtu_compile.graph import io as graph_io
    from mtu_compile.graph.qdq import LAYERS

    require_graph(graph)
    model = graph_io.load(graph).graph
    names: list[str] = []
    owner: dict[str, str] = {}
    for node in model:
        if node.op_type not in LAYERS:
            continue
        name = node.name or ""
        if not name or name in names:
            raise ModelError(f"layer {name!r} of {graph.name} has no name of its own", hint="export the model again")
        names.append(name)
        for alias in _aliases(node):
            owner.setdefault(alias, name)
    if not names:
        raise ModelError(f"{graph.name} has no layers: neither Conv nor Gemm nor MatMul")
    return Layers(tuple(names), owner, frozenset((*owner, *(node.name for node in model if node.name))))


def _aliases(layer: ir.Node) -> Iterator[str]:
    """The layer's own name, that of an addition of its bias, and the graph output's that OpenVINO calls the last by."""
    yield layer.name or ""
    result = layer.outputs[0]
    readers = [use.node for use in result.uses()]
    if len(readers) == 1 and readers[0].op_type == "Add":
        added = [value for value in readers[0].inputs if value is not result]
        if all(value is not None and value.is_initializer() for value in added):
            yield readers[0].name or ""
            result = readers[0].outputs[0]
    if result.is_graph_output():
        yield result.name or ""


@dataclass(frozen=True)
class Kernel:
    """One step of a compiled network.

    Attributes:
        name: of the compiler's.
        layers: whose product it computes; none for norms, softmax, conversions and the like.
        reads: indices of the kernels whose results it reads, constants left out.
    """

    name: str
    layers: tuple[str, ...]
    reads: tuple[int, ...]


def charge(kernels: Sequence[Kernel]) -> list[tuple[str, ...]]:
    """The layers each kernel's time is divided among, evenly; none for what belongs to no layer.

    A kernel that computes layers is theirs. Any other is charged to the layers that read its result, directly or
    through other kernels: quantisers and changes of layout, and also the norm, activation or residual in front of a
    layer, since the compiler may fuse a quantiser with any of them, so that only both together compare between a float
    and a quantised graph. Reading ends where branches meet (an addition to a residual, a concatenation): what is only
    read there belongs to the layer that made it.

    Args:
        kernels: in the order they run.
    """
    readers: list[list[int]] = [[] for _ in kernels]
    roots: list[int] = []
    meets: list[bool] = []
    for index, kernel in enumerate(kernels):
        for source in dict.fromkeys(kernel.reads):
            readers[source].append(index)
        found = dict.fromkeys(roots[source] for source in kernel.reads)
        meets.append(not kernel.layers and len(found) > 1)
        passes_on = not kernel.layers and len(found) == 1
        roots.append(next(iter(found)) if passes_on else index)
    ahead: list[tuple[str, ...]] = [()] * len(kernels)
    for index in reversed(range(len(kernels))):
        layers: dict[str, None] = {}
        for reader in readers[index]:
            if kernels[reader].layers:
                layers.update(dict.fromkeys(kernels[reader].layers))
            elif not meets[reader]:
                layers.update(dict.fromkeys(ahead[reader]))
        ahead[index] = tuple(layers)
    return [kernel.layers or ahead[index] or kernels[roots[index]].layers for index, kernel in enumerate(kernels)]


def attribute(
    kernels: Sequence[Kernel], milliseconds: Sequence[float], layers: Layers, *, source: str, measured: bool
) -> LayerCosts:
    """Divide the time of each kernel among its layers (see ``charge``).

    Args:
        milliseconds: of each kernel.
        layers: those that get a cost; one that no kernel computes (it was folded away) costs nothing.
    """
    costs = dict.fromkeys(layers.names, 0.0)
    for share, spent in zip(charge(kernels), milliseconds, strict=True):
        for layer in share:
            costs[layer] += spent / len(share)
    return LayerCosts(costs, sum(milliseconds), source, measured)


@dataclass(frozen=True)
class ComparedCosts:
    """A float graph and its quantised form on one device.

    Attributes:
        float_costs: of the float graph in the type that runs beside quantised layers.
        int8_costs: of the quantised graph.
    """

    float_costs: LayerCosts
    int8_costs: LayerCosts

    @property
    def source(self) -> str:
        """How the figures were come by."""
        return self.int8_costs.source

    @property
    def measured(self) -> bool:
        """Whether both ran on the device."""
        return self.float_costs.measured and self.int8_costs.measured

    @property
    def layers(self) -> dict[str, tuple[float, float]]:
        """By layer, milliseconds in float and quantised, in graph order."""
        quantised = self.int8_costs.milliseconds
        return {name: (spent, quantised[name]) for name, spent in self.float_costs.milliseconds.items()}

    def slower(
        self, groups: Iterable[Sequence[str]] | None = None, *, share: float = SLOWER_SHARE, least_ms: float = SLOWER_MS
    ) -> tuple[tuple[str, ...], ...]:
        """The groups of layers whose quantised form is slower by more than measurements differ.

        Args:
            groups: layers that are quantised together, as they share a quantiser; each layer by itself if not given.
            share: part of the float time by which a group may be slower.
            least_ms: milliseconds by which it may be, whatever its part; both have to be exceeded.
        """
        layers = self.layers
        found = []
        for group in groups if groups is not None else ((name,) for name in layers):
            in_float, quantised = (sum(layers[name][place] for name in group) for place in (0, 1))
            if quantised - in_float > max(share * in_float, least_ms):
                found.append(tuple(group))
        return tuple(found)


def compare_costs(
    target: Target,
    float_graph: Path,
    int8_graph: Path,
    *,
    precision: Precision = "int8",
    rounds: int = COST_ROUNDS,
) -> ComparedCosts | None:
    """Cost of every layer in the float type the device has and quantised, or ``None`` where nothing is known of it.

    Where costs are measured, the two graphs take turns, so that a machine that is busy slows down both.

    Args:
        target: the device.
        float_graph: static float graph of one task, lowered for ``target.companion_precision(precision)``.
        int8_graph: the same graph quantised, lowered for ``precision``.
        precision: what ``int8_graph`` is quantised to.
        rounds: inferences of each, where they are measured.

    Raises:
        ConfigError: a precision the target does not know, or no rounds.
        ModelError: a graph is unreadable, or the two do not have the same layers.
        TargetError: as ``Target.build``.
    """
    names = [set(read_layers(graph).names) for graph in (float_graph, int8_graph)]
    if differing := sorted(names[0] ^ names[1]):
        raise ModelError(f"layer {differing[0]!r} is only in one of {float_graph.name} and {int8_graph.name}")
    graphs = ((float_graph, target.companion_precision(precision)), (int8_graph, precision))
    found = target.layer_costs_in_turn(graphs, rounds=rounds)
    return None if found is None else ComparedCosts(found[0], found[1])
