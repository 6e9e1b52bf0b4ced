"""What a target is: its facts, the questions it answers before a build, and the build itself.

A device family is one file in this package with one class and its ``TargetSpec`` values; ``targets.get`` finds them by
name. Everything that differs between two members of a family (memory, precisions, compute capability) is in the spec.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from mtu_compile.bundle import EngineRef, EngineState, Estimate
from mtu_compile.core.errors import ConfigError, ModelError, ToolchainMissing
from mtu_compile.core.precision import Precision as Precision
from mtu_compile.core.progress import Progress
from mtu_compile.runtime.engine import Engine

#: Bytes in a mebibyte and a gibibyte, for specs.
MIB, GIB = 1 << 20, 1 << 30

#: Inferences a graph's layers are timed over: seconds for the example, a minute or two for Stable Diffusion 1.5.
COST_ROUNDS = 96

#: Bytes to be saved that are worth an arrangement of weights which other tools have to be told of.
LEAST_SHARED = 8 << 20


class BoardSystem(Protocol):
    """A system that boards of a target run, as far as it decides which wheels fit."""

    @property
    def python(self) -> str:
        """Its CPython ("3.10")."""
        ...

    @property
    def glibc(self) -> str:
        """Version of its glibc ("2.35")."""
        ...

    @property
    def machine(self) -> str:
        """The wheels' architecture ("aarch64")."""
        ...

    @property
    def packages(self) -> tuple[str, ...]:
        """Requirements beside mtu-compile's own ("cuda-python==12.6.*")."""
        ...


@dataclass(frozen=True)
class TargetSpec:
    """Facts about a target; nothing here is probed.

    Attributes:
        name: what ``--target`` is given.
        vendor: whose toolchain builds for it.
        device: the device, in the vendor's words.
        precisions: what it can be built in, best first.
        opset: newest ONNX opset its importer reads; ``targets.opset`` refuses a graph of a newer one.
        memory_bytes: memory the engine has to fit in, or ``None`` if that depends on the machine (``Target.memory``).
        reserved_bytes: of ``memory_bytes``, what the system and the driver keep for themselves.
        shared: part of its machine's memory the device may use, where the two share it; ``None`` where it has its own.
        least_memory_bytes: memory of the smallest machines the device is found in, where it shares theirs.
        scratch: how many times the estimate of activations an engine may take, scratch space of its kernels included.
        rest: float type of what a quantised graph does not quantise.
        shared_batch: samples an engine that several tasks share computes at once; ``None``: any number. Where it is 1
            such an engine is run once for each sample, so that none costs more than it has to.
        unpacks_weights: networks of which only the weights are quantised are unpacked when they are compiled, and take
            at least the memory of the float type.
        lowering: by precision, ids of the passes a (quantised) static graph goes through before it is built.
        sources: where each number comes from, by attribute name.
    """

    name: str
    vendor: str
    device: str
    precisions: tuple[Precision, ...]
    opset: int
    memory_bytes: int | None
    reserved_bytes: int = 0
    shared: float | None = None
    least_memory_bytes: int | None = None
    scratch: float = 1.0
    rest: Precision = "fp16"
    shared_batch: int | None = 1
    unpacks_weights: bool = False
    lowering: Mapping[Precision, tuple[str, ...]] = field(default_factory=dict, hash=False)
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    def board_requirements(self) -> Mapping[str, Any] | None:
        """What a board has to have to build the engines itself; ``None`` where they are built on the build machine."""
        return None

    def board_systems(self) -> tuple[BoardSystem, ...]:
        """The systems such a board may run, for which its bundle brings wheels."""
        return ()

    def check_precision(self, precision: str) -> None:
        """``ConfigError`` naming the precisions this target knows."""
        if precision not in self.precisions:
            known = ", ".join(self.precisions)
            raise ConfigError(f"target {self.name!r} cannot be built in {precision}", hint=f"it takes {known}")


@dataclass(frozen=True)
class Availability:
    """Whether a target's toolchain is on this machine.

    Attributes:
        ok: a build can be started.
        toolchain: name of the vendor package.
        version: its version, or ``None`` if it is not here.
        install_hint: the command that installs it.
        detail: the device as the toolchain names it, or why it cannot be used.
    """

    ok: bool
    toolchain: str
    version: str | None
    install_hint: str
    detail: str = ""

    def require(self, target: str) -> None:
        """``ToolchainMissing`` (exit code 4) unless ``ok``."""
        if not self.ok:
            why = f": {self.detail}" if self.detail else ""
            raise ToolchainMissing(f"target {target!r} needs {self.toolchain}{why}", hint=self.install_hint)


@dataclass(frozen=True)
class Artifact:
    """A network as a bundle carries it: the portable graph, and beside it the engine if it could be built here.

    Attributes:
        kind: which runtime opens it (``"openvino"``, ``"tensorrt"``, ``"tensorrt-rtx"``).
        path: the portable graph: an IR's ``.xml``, or an ONNX file.
        config: options the runtime opens (or builds) it with.
        files: every file that belongs to it, ``path`` included.
        precision: what it was built in.
        toolchain: name and version of what built it.
        prebuilt: the engine (or NPU blob) built here, if one was.
        state: how far it got here; nothing is run to build it, so never ``MEASURED``.
        reason: why no further (``"no NVIDIA GPU on this machine"``).
        estimate: the toolchain's own figures about the device; never measured.
    """

    kind: str
    path: Path
    config: Mapping[str, str]
    files: tuple[Path, ...]
    precision: Precision
    toolchain: str
    prebuilt: Path | None = None
    state: EngineState = EngineState.BUILT
    reason: str | None = None
    estimate: Estimate | None = None


@dataclass(frozen=True)
class LayerCosts:
    """What each layer of a graph costs on a device.

    Attributes:
        milliseconds: by name of an ONNX Conv, Gemm or MatMul node, in graph order: its own kernel and what stands in
            front of it (see ``targets.costs.layers.charge``).
        total_ms: of everything, what belongs to no layer included.
        source: how the figures were come by, in words.
        measured: they were taken on the target's device, in this machine; else they are a cost model's.
    """

    milliseconds: Mapping[str, float]
    total_ms: float
    source: str
    measured: bool

    def __post_init__(self) -> None:
        for name, spent in (*self.milliseconds.items(), ("all layers", self.total_ms)):
            if not math.isfinite(spent) or spent < 0:
                raise ValueError(f"the cost of {name} is {spent} ms")
        if self.attributed_ms > self.total_ms * (1 + 1e-6):
            raise ValueError(f"layers cost {self.attributed_ms} ms of {self.total_ms} ms")

    @property
    def attributed_ms(self) -> float:
        """The part of ``total_ms`` that belongs to a layer."""
        return math.fsum(self.milliseconds.values())


#: Makes of an ONNX graph in half precision one in float32 that rounds where its types say so: CPUs compute most of such
#: a graph in float32, and have no bfloat16 (``passes.write_simulation``).
Rounded = Callable[[Path], Path]


class Target(Protocol):
    """A device an ONNX graph can be built for."""

    @property
    def spec(self) -> TargetSpec:
        """The target's facts."""
        ...

    def probe(self) -> Availability:
        """What toolchain is here. Never raises."""
        ...

    def memory(self) -> int | None:
        """Memory of the device in bytes, from the spec or asked of the device; ``None`` where neither knows."""
        ...

    def check_graph(self, graph: Path, *, precision: Precision) -> None:
        """``BuildError`` naming the ONNX nodes the target's importer does not take.

        Called on the float graph, before time is spent on calibration. Does nothing where the importer is not here.
        """
        ...

    def build(self, graph: Path, out: Path, *, precision: Precision, progress: Progress | None = None) -> Artifact:
        """Build ``graph``, which went through ``spec.lowering[precision]``, into the folder ``out``, new or empty.

        Raises:
            ConfigError: a precision the target does not know, or ``out`` exists and is not an empty folder.
            ToolchainMissing: the vendor toolchain is not installed.
            ModelError: ``graph`` is not a readable file.
            BuildError: the toolchain refused the graph; nothing is left in ``out``.
            MtuError: the disk is full, or ``out`` cannot be written; nothing is left either.
        """
        ...

    def companion_precision(self, precision: Precision) -> Precision:
        """What the text encoder and the autoencoder are built in beside a UNet in ``precision``; never INT8."""
        ...

    def layer_costs(self, graph: Path, *, precision: Precision, rounds: int = COST_ROUNDS) -> LayerCosts | None:
        """What each layer of ``graph``, lowered as for ``build``, costs; ``None`` where the device is not known enough.

        Args:
            graph: static ONNX graph of one task, float or quantised.
            precision: what it would be built in.
            rounds: inferences, where costs are measured.

        Raises:
            ConfigError: a precision the target does not know, or no rounds.
            ModelError: ``graph`` is not a readable file, or has no layers.
            TargetError: as ``build``.
        """
        ...

    def layer_costs_in_turn(
        self, graphs: Sequence[tuple[Path, Precision]], *, rounds: int = COST_ROUNDS
    ) -> tuple[LayerCosts, ...] | None:
        """``layer_costs`` of several graphs, which take turns where they are measured, so that they compare."""
        ...

    def device_here(self) -> bool:
        """Whether this machine has the device and the runtime, so that what was built can be run. Never raises."""
        ...

    def host_engine(self, engine: EngineRef) -> EngineRef:
        """How this machine runs the same graph without the device, to measure what precision costs.

        The very engine where the device is the machine's own CPU.
        """
        ...

    def stand_in(self, precision: Precision) -> float:
        """How often ``host_engine`` holds the float32 weights of a UNet that is built in ``precision``.

        0 where it takes no more memory than the build does anyway.
        """
        ...

    def share_weights(
        self, folder: Path, engines: Mapping[str, EngineRef], *, least_bytes: int = LEAST_SHARED
    ) -> Mapping[str, EngineRef]:
        """Keep in one file what the graphs of a bundle's tasks have in common of their weights.

        What they compute stays the same, bit for bit. Weights are not all in memory at any time.

        Args:
            folder: the bundle, in the making.
            engines: the UNets of two or more tasks, by task; the first is the one that other tools open by themselves.
            least_bytes: what has to be saved at least.

        Returns:
            The engines by task, as they are now; ``engines``, and nothing is changed, where there is less to save.
        """
        ...

    def open_on_host(self, engine: EngineRef, graph: Path, rounded: Rounded, weights: Path | None = None) -> Engine:
        """Open the network as ``host_engine`` says, rounding where the device would.

        Args:
            engine: the network, as a bundle carries it.
            graph: its file.
            rounded: see ``Rounded``.
            weights: the graph's, where they lie in a file that serves other graphs, too.

        Raises:
            ToolchainMissing, TargetError: as ``mtu_compile.runtime.engine.open_engine``.
        """
        ...

    def publish(self, folder: Path, index: Mapping[str, Any] | None, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Add to a bundle whose engines are there what the vendor's own tools read beside them; nothing, for most.

        Args:
            folder: the bundle.
            index: what diffusers calls ``model_index.json``; ``None`` where their pipelines cannot run the UNet.
            configs: by folder, the ``config.json`` of its network.
        """
        ...

    def measured_with(self, engine: EngineRef, *, on_device: bool) -> str:
        """What ran the network, in words: package, version and device, and what the latter stands in for."""
        ...


SpecT = TypeVar("SpecT", bound=TargetSpec)


class SpecTarget(ABC, Generic[SpecT]):
    """What targets have in common: a spec, and a way of costing several graphs that one graph is costed by, too."""

    def __init__(self, spec: SpecT) -> None:
        self._spec = spec

    @property
    def spec(self) -> SpecT:
        return self._spec

    def layer_costs(self, graph: Path, *, precision: Precision, rounds: int = COST_ROUNDS) -> LayerCosts | None:
        found = self.layer_costs_in_turn([(graph, precision)], rounds=rounds)
        return None if found is None else found[0]

    @abstractmethod
    def layer_costs_in_turn(
        self, graphs: Sequence[tuple[Path, Precision]], *, rounds: int = COST_ROUNDS
    ) -> tuple[LayerCosts, ...] | None:
        """See ``Target``."""

    def stand_in(self, precision: Precision) -> float:
        return 0.0


def require_graph(graph: Path) -> None:
    """``ModelError`` unless ``graph`` is a file."""
    if not graph.is_file():
        raise ModelError(f"graph {graph} does not exist", hint="export the model first")
