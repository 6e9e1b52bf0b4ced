"""Cost of every layer on this machine's CPU, by ONNX Runtime's own profile."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtu_compile.core.atomic import scratch
from mtu_compile.core.errors import BuildError, ConfigError, TargetError
from targets.base import LayerCosts
from targets.costs.layers import Kernel, Layers, attribute, read_layers
from targets.costs.timing import undisturbed
from targets.onnxruntime.engine import open_session, session_options

if TYPE_CHECKING:
    import onnx_ir as ir

#: Inferences before the first that counts: the first one allocates.
WARM_UP = 3

#: The operators of optimised graphs that compute a layer.
_PRODUCTS = frozenset(
    {"Conv", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulIntegerToFloat", "QGemm"}
    | {"QLinearConv", "QLinearMatMul"}
)

#: What a convolution in ONNX Runtime's own layout is called after its output.
_BLOCKED = "_nchwc"


def measure(graphs: Sequence[Path], rounds: int, source: str) -> tuple[LayerCosts, ...]:
    """Run each graph ``rounds`` times, in turns, and attribute the time of each kernel to layers.

    Raises:
        ConfigError: no rounds.
        ModelError: a graph is unreadable, or has no layers.
        BuildError: ONNX Runtime does not take a graph.
    """
    if rounds < 1:
        raise ConfigError(f"{rounds} rounds are too few to measure anything")
    layers = [read_layers(graph) for graph in graphs]
    with scratch("mtu-profile") as work:
        try:
            pairs = zip(graphs, layers, strict=True)
            meters = [_Meter(graph, found, work / str(i)) for i, (graph, found) in enumerate(pairs)]
        except TargetError as error:
            raise BuildError(error.message, hint=error.hint) from error
        for _ in range(WARM_UP + rounds):
            for meter in meters:
                meter.run()
        return tuple(meter.costs(source) for meter in meters)


class _Meter:
    """One graph with its profile on."""

    def __init__(self, graph: Path, layers: Layers, folder: Path) -> None:
        from mtu_compile.graph import io as graph_io

        folder.mkdir()
        options = session_options()
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimised.data")
        self._session: Any = open_session(graph, options)
        self._feed = {value.name: _numbers(value) for value in self._session.get_inputs()}
        self._layers = layers
        outputs = {node.outputs[0].name: node.name for node in graph_io.load(graph).graph if node.outputs}
        self._kernels = read_kernels(graph_io.load(folder / "optimised.onnx"), layers, outputs)

    def run(self) -> None:
        self._session.run(None, self._feed)

    def costs(self, source: str) -> LayerCosts:
        spent = read_profile(Path(self._session.end_profiling()), [kernel.name for kernel in self._kernels])
        microseconds = undisturbed(spent[WARM_UP:], np.zeros(len(spent) - WARM_UP))
        return attribute(self._kernels, (microseconds / 1e3).tolist(), self._layers, source=source, measured=True)


def read_kernels(optimised: ir.Model, layers: Layers, outputs: Mapping[str | None, str | None]) -> list[Kernel]:
    """The kernels of an optimised graph, in an order in which they can run.

    Args:
        optimised: as ONNX Runtime wrote it.
        layers: of the graph it was made from.
        outputs: by the name of a value of that graph, the node that makes it.
    """
    optimised.graph.sort()
    places: dict[ir.Node, int] = {}
    kernels: list[Kernel] = []
    for node in optimised.graph:
        name = node.name or ""
        made = outputs.get(name.removesuffix(_BLOCKED)) if name.endswith(_BLOCKED) else None
        computed = layers.of([name, *([made] if made else [])]) if node.op_type in _PRODUCTS else ()
        sources = (value.producer() for value in node.inputs if value is not None)
        reads = tuple(dict.fromkeys(places[source] for source in sources if source in places))
        places[node] = len(kernels)
        kernels.append(Kernel(name, computed, reads))
    return kernels


def read_profile(file: Path, names: Sequence[str]) -> Any:
    """Microseconds of each kernel in each run: [runs, kernels]; kernels of one name share their time evenly."""
    spent: dict[str, list[float]] = defaultdict(list)
    runs = 0
    for event in _events(file):
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["name"].removesuffix("_kernel_time")].append(float(event["dur"]))
        runs += event["cat"] == "Session" and event["name"] == "model_run"
    shares = {name: names.count(name) for name in names}
    found = np.zeros((runs, len(names)))
    for column, name in enumerate(names):
        times = np.array(spent.get(name, ()))
        if len(times) and len(times) % runs == 0:
            found[:, column] = times.reshape(runs, -1).sum(axis=1) / shares[name]
    return found


def _events(file: Path) -> Iterator[Mapping[str, Any]]:
    yield from json.loads(file.read_text(encoding="utf-8"))


def _numbers(value: Any) -> Any:
    """Numbers of the right shape: noise, and a timestep in the middle."""
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    if value.type != "tensor(float)":
        return np.zeros(shape, np.int64 if value.type == "tensor(int64)" else np.int32)
    if value.name == "timestep":
        return np.full(shape, 500, np.float32)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
