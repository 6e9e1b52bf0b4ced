"""What every OpenVINO device has in common: one IR, written once, that the device's plugin compiles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mtu_compile.bundle import EngineRef, EngineState, Estimate
from mtu_compile.core.atomic import scratch, staging
from mtu_compile.core.errors import ModelError
from mtu_compile.core.precision import QUANTISED, WEIGHTS_ONLY
from mtu_compile.core.progress import Progress
from mtu_compile.runtime.engine import Engine, open_engine
from targets.base import (
    COST_ROUNDS,
    LEAST_SHARED,
    Artifact,
    Availability,
    LayerCosts,
    Precision,
    Rounded,
    SpecTarget,
    TargetSpec,
)
from targets.costs.layers import read_layers
from targets.openvino.costs import IR, measure
from targets.openvino.float_engine import COPIES
from targets.openvino.host import FLOAT_ACTIVATIONS, HOST_CONFIG, HOST_KIND
from targets.openvino.ir import (
    any_number_of_prompts,
    free_batch,
    keep_angles_precise,
    probe_openvino,
    prove_compiles,
    read_graph,
    whole_timesteps,
    write_ir,
)
from targets.openvino.layout import write_layout
from targets.openvino.shared_ir import share_constants
from targets.opset import require_opset

if TYPE_CHECKING:
    import openvino


@dataclass(frozen=True)
class Compiled:
    """What a device's own compiler made of an IR: a blob, if it made one, and its own figures; see ``Artifact``."""

    prebuilt: Path | None
    state: EngineState = EngineState.BUILT
    reason: str | None = None
    estimate: Estimate | None = None


class OpenVINOTarget(SpecTarget[TargetSpec]):
    """A device OpenVINO has a plugin for; a family says what it runs in and how the device's own compile step goes."""

    #: Properties that keep the activations of layers with compressed weights float, where the plugin has such.
    float_activations: Mapping[str, str] = FLOAT_ACTIVATIONS

    def probe(self) -> Availability:
        return probe_openvino(self._spec.device)

    def check_graph(self, graph: Path, *, precision: Precision) -> None:
        self._spec.check_precision(precision)
        if self.probe().ok:
            self._read(graph)

    def build(self, graph: Path, out: Path, *, precision: Precision, progress: Progress | None = None) -> Artifact:
        """Write ``out/openvino_model.xml`` and ``.bin``, and what the device's compiler adds (see ``Target.build``)."""
        self._spec.check_precision(precision)
        availability = self.probe()
        availability.require(self._spec.name)
        config = self.config(precision)
        model = self._read(graph)
        with staging(out, replace=True) as folder:
            path = self.write(model, folder, precision)
            made = self.compile_ir(path, config, progress or Progress())
            files = tuple(sorted(file.name for file in folder.iterdir()))
        return Artifact(
            kind="openvino",
            path=out / path.name,
            config=config,
            files=tuple(out / name for name in files),
            precision=precision,
            toolchain=f"openvino {availability.version}",
            prebuilt=None if made.prebuilt is None else out / made.prebuilt.name,
            state=made.state,
            reason=made.reason,
            estimate=made.estimate,
        )

    def _read(self, graph: Path) -> openvino.Model:
        if graph.suffix == ".onnx":
            with suppress(ModelError):  # OpenVINO says what is wrong with the file
                require_opset(graph, self._spec)
        return read_graph(graph)

    def config(self, precision: Precision) -> dict[str, str]:
        """What an engine in ``precision`` is opened with."""
        found = {"device": self._spec.device, "INFERENCE_PRECISION_HINT": self.inference_precision(precision)}
        return {**found, **self.float_activations} if precision in WEIGHTS_ONLY else found

    def write(self, model: openvino.Model, folder: Path, precision: Precision) -> Path:
        """Write the IR of a graph that was read, and is changed, into the existing ``folder``."""
        if free_batch(model):
            any_number_of_prompts(model)
        if self.inference_precision(precision) != "f32":
            keep_angles_precise(model)
        whole_timesteps(model)
        return write_ir(model, folder, fp16_weights=self.half_weights(precision))

    def layer_costs_in_turn(
        self, graphs: Sequence[tuple[Path, Precision]], *, rounds: int = COST_ROUNDS
    ) -> tuple[LayerCosts, ...] | None:
        """Measured with the device's own counters, where the device is."""
        with self.written(graphs) as irs:
            if not self.device_here():
                return None
            probe = self.probe()
            return measure(irs, rounds, f"openvino {probe.version} on {probe.detail}, measured")

    @contextmanager
    def written(self, graphs: Sequence[tuple[Path, Precision]]) -> Iterator[list[IR]]:
        """The IRs of ``graphs`` as they would be built, for as long as they are needed; raises as ``build``."""
        for _, precision in graphs:
            self._spec.check_precision(precision)
        layers = [read_layers(graph) for graph, _ in graphs]
        self.probe().require(self._spec.name)
        with scratch("mtu-costs") as work:
            irs = []
            for index, (graph, precision) in enumerate(graphs):
                folder = work / str(index)
                folder.mkdir()
                path = self.write(read_graph(graph), folder, precision)
                irs.append(IR(path, self.config(precision), layers[index]))
            yield irs

    def half_weights(self, precision: Precision) -> bool:
        """Whether float weights are stored as fp16; beside INT8 weights the few that are left stay as they are."""
        return precision in ("fp16", "bf16")

    def device_here(self) -> bool:
        try:
            import openvino

            found = openvino.Core().available_devices
        except (ImportError, RuntimeError):
            return False
        return any(device.split(".")[0] == self._spec.device for device in found)

    def host_engine(self, engine: EngineRef) -> EngineRef:
        return replace(engine, kind=HOST_KIND, config=dict(HOST_CONFIG), prebuilt=None)

    def stand_in(self, precision: Precision) -> float:
        """Integers become float32 where this machine stands in for the device."""
        return COPIES if precision in (*QUANTISED, *WEIGHTS_ONLY) else 0.0

    def share_weights(
        self, folder: Path, engines: Mapping[str, EngineRef], *, least_bytes: int = LEAST_SHARED
    ) -> Mapping[str, EngineRef]:
        """In the ``.bin`` of the first, which other tools open as before; blobs keep what is compiled into them."""
        read = share_constants([folder / ref.path for ref in engines.values()], least_bytes=least_bytes)
        if read is None:
            return engines
        weights = str(PurePosixPath(next(iter(engines.values())).path).with_suffix(".bin"))
        pairs = zip(engines.items(), read, strict=True)
        return {task: replace(ref, weights=weights, weights_bytes=size) for (task, ref), size in pairs}

    def open_on_host(self, engine: EngineRef, graph: Path, rounded: Rounded, weights: Path | None = None) -> Engine:
        """On the CPU; an IR, whose types say nothing of the device's float16, rounds as it runs."""
        used = self.host_engine(engine)
        if self._rounds(engine):
            from targets.openvino.half_ir import HalfEngine

            return HalfEngine(graph, used.config, weights)
        return open_engine(used.kind, graph, used.config, weights=weights)

    def publish(self, folder: Path, index: Mapping[str, Any] | None, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """What OpenVINO GenAI and optimum-intel read."""
        write_layout(folder, index, configs)

    def measured_with(self, engine: EngineRef, *, on_device: bool) -> str:
        name, device = f"openvino {version('openvino')}", self._spec.device
        if on_device:
            return f"{name} on {engine.config.get('device', 'CPU')}"
        used = self.host_engine(engine)
        how = ", INT8 computed in float32" if used.kind == HOST_KIND else ""
        rounding = ", rounding to float16 as it does" if self._rounds(engine) else ""
        return f"{name} on {used.config['device']}{how}, the same graph{rounding}; no {device} in this machine"

    def _rounds(self, engine: EngineRef) -> bool:
        """Whether the device computes an IR in float16 that this machine runs in float32."""
        runs = self.host_engine(engine).kind
        return runs == HOST_KIND and engine.config.get("INFERENCE_PRECISION_HINT") == "f16"

    @abstractmethod
    def inference_precision(self, precision: Precision) -> str:
        """OpenVINO's name of the float type that what is not quantised runs in."""

    @abstractmethod
    def companion_precision(self, precision: Precision) -> Precision:
        """See ``Target.companion_precision``."""

    @abstractmethod
    def memory(self) -> int | None:
        """Memory of the device in bytes; ``None`` where it is not here to be asked."""

    def compile_ir(self, path: Path, config: Mapping[str, str], progress: Progress) -> Compiled:
        """The device's own compile step; ``BuildError`` if it refuses the IR."""
        options = {key: value for key, value in config.items() if key != "device"}
        prove_compiles(path, self._spec.device, options)
        return Compiled(None)
