"""NVIDIA GPUs: TensorRT-RTX for desktop ones, whose engines are built here without a GPU, and TensorRT itself.

TensorRT only builds for the GPU it runs on. Where that is this machine's the engine is built here; a board (its spec
says ``built="board"``) gets the lowered graph and the recipe, and builds with the same code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mtu_compile.bundle import EngineRef, EngineState
from mtu_compile.core.atomic import staging
from mtu_compile.core.errors import MtuError, TargetError, ToolchainMissing
from mtu_compile.core.guidance import ROWS
from mtu_compile.core.precision import WEIGHTS_ONLY
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
    require_graph,
)
from targets.costs.roofline import Speed, estimate_costs
from targets.nvidia import builder as tensorrt_builder
from targets.nvidia.builder import Kind, Recipe
from targets.nvidia.cuda import Device, device_info
from targets.nvidia.library import install_hint
from targets.nvidia.recipe import Profile
from targets.opset import require_opset
from targets.shared_onnx import share_onnx_weights

GRAPH_NAME = "model.onnx"
ENGINE_NAME = "model.engine"

#: What makes a (quantised) static graph strongly typed; types and Q/DQ nodes are all that TensorRT looks at.
LOWERING: Mapping[Precision, tuple[str, ...]] = {
    "int8": ("mtu::legalise-qdq", "mtu::to-fp16"),
    "fp8": ("mtu::legalise-qdq", "mtu::to-fp16"),
    "int8-weights": ("mtu::to-fp16",),
    "int4-weights": ("mtu::to-fp16",),
    "fp16": ("mtu::to-fp16",),
    "bf16": ("mtu::to-bf16",),
    "fp32": (),
}

#: Samples a shared engine runs: the fewest, those with guidance by text, which it is tuned for, and the most.
SAMPLES = (1, len(ROWS["text"]), max(len(rows) for rows in ROWS.values()))

#: GPUs that TensorRT-RTX's portable engines run on (its support matrix 1.5: "by default portable across devices with
#: compute capabilities 8.6, 8.9, and 12.0").
PORTABLE = ("8.6", "8.9", "12.0")


@dataclass(frozen=True)
class TensorRTSpec(TargetSpec):
    """A GPU or a family of them.

    Attributes:
        kind: the library that builds and runs the engines.
        built: where: on this machine, or on the board.
        compute_capabilities: what the engines are for (see ``Recipe``); none for TensorRT-RTX's portable engine, or
            the GPU of this machine.
        workspace_bytes: scratch memory a layer may use; ``None`` for all there is.
        optimization_level: TensorRT's, 0 to 5; ``None`` for its own.
        speed: what layers are estimated by; of a typical card where there are many; ``None`` if nothing is known.
    """

    kind: Kind = "tensorrt-rtx"
    built: Literal["here", "board"] = "here"
    compute_capabilities: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    speed: Speed | None = None

    def recipe(self, profiles: Mapping[str, Profile] | None = None) -> Recipe:
        """How an engine is built; ``profiles`` of the inputs of dynamic shape (see ``Recipe``)."""
        return Recipe(self.workspace_bytes, self.compute_capabilities, self.optimization_level, profiles or {})


def batch_profiles(graph: Path) -> dict[str, Profile]:
    """Shapes for the inputs whose batch is free: from one sample to those of the kind of guidance that takes most."""
    from mtu_compile.graph import io as graph_io
    from mtu_compile.graph.edit import BATCH

    profiles: dict[str, Profile] = {}
    for value in graph_io.load(graph).graph.inputs:
        sizes = [size if isinstance(size, int) else size.value for size in value.shape or ()]
        if BATCH in sizes:
            least, usual, most = (tuple(n if size == BATCH else size for size in sizes) for n in SAMPLES)
            profiles[value.name or ""] = (least, usual, most)  # type: ignore[assignment]
    return profiles


class TensorRTTarget(SpecTarget[TensorRTSpec]):
    """A GPU that TensorRT or TensorRT-RTX builds for.

    Quantised layers run between fp16 ones. TensorRT-RTX lists INT8 for weights only (support matrix 1.0 to 1.5), so an
    INT8 graph that builds is no proof of an INT8 run; no engine was run yet.
    """

    def probe(self) -> Availability:
        if self._spec.built == "board":
            return Availability(
                True, "tensorrt", None, "", "engines are built on the board, by mtu-compile board build"
            )
        try:
            trt = tensorrt_builder.load_tensorrt(self._spec.kind)
        except ToolchainMissing as error:
            return Availability(False, self._spec.kind, None, error.hint or "", error.message)
        name, release, hint = str(trt.__name__), str(trt.__version__), install_hint(self._spec.kind)
        try:
            device = device_info()
        except TargetError as error:
            if self._spec.kind == "tensorrt-rtx":  # needs no GPU to build for one
                return Availability(True, name, release, hint, f"engines are built and not run: {error.message}")
            return Availability(False, name, release, error.hint or hint, error.message)
        return Availability(True, name, release, hint, f"{device.name}, compute capability {device.compute_capability}")

    def memory(self) -> int | None:
        if self._spec.memory_bytes is not None:
            return self._spec.memory_bytes
        device = self._device()
        return None if device is None else device.total_bytes

    def check_graph(self, graph: Path, *, precision: Precision) -> None:
        """Ask the ONNX parser; a board's TensorRT is asked through the one that is here, of another version."""
        self._spec.check_precision(precision)
        require_graph(graph)
        require_opset(graph, self._spec)
        for kind in dict.fromkeys((self._spec.kind, "tensorrt-rtx")):
            try:
                tensorrt_builder.load_tensorrt(kind)
            except ToolchainMissing:
                continue
            tensorrt_builder.check_graph(graph, kind)
            return

    def build(self, graph: Path, out: Path, *, precision: Precision, progress: Progress | None = None) -> Artifact:
        """Copy ``graph`` to ``out/model.onnx`` and build ``out/model.engine`` from it (see ``Target.build``)."""
        from mtu_compile.graph import io as graph_io

        self._spec.check_precision(precision)
        self.probe().require(self._spec.name)
        require_graph(graph)
        require_opset(graph, self._spec)
        recipe = self._spec.recipe(batch_profiles(graph))
        toolchain = f"{self._spec.kind}, on the board"
        with staging(out, replace=True) as folder:
            copy = graph_io.save(graph_io.load(graph), folder / GRAPH_NAME)
            if self._spec.built == "here":
                with (progress or Progress()).stage(f"{self._spec.kind} engine") as advance:
                    built = tensorrt_builder.build_engine(
                        copy, folder / ENGINE_NAME, recipe, kind=self._spec.kind, advance=advance
                    )
                toolchain = built.toolchain
            files = tuple(sorted(file.name for file in folder.iterdir()))
        state, reason = self._state()
        return Artifact(
            kind=self._spec.kind,
            path=out / GRAPH_NAME,
            config=recipe.to_config(),
            files=tuple(out / name for name in files),
            precision=precision,
            toolchain=toolchain,
            prebuilt=out / ENGINE_NAME if ENGINE_NAME in files else None,
            state=state,
            reason=reason,
        )

    def layer_costs_in_turn(
        self, graphs: Sequence[tuple[Path, Precision]], *, rounds: int = COST_ROUNDS
    ) -> tuple[LayerCosts, ...] | None:
        """Estimated by the GPU's data sheet, whether it is here or not."""
        for graph, precision in graphs:
            self._spec.check_precision(precision)
            require_graph(graph)
        speed, rest = self._spec.speed, self._spec.rest
        if speed is None:
            return None
        return tuple(estimate_costs(graph, speed, precision=precision, rest=rest) for graph, precision in graphs)

    def companion_precision(self, precision: Precision) -> Precision:
        """The type of the UNet, or of what is not quantised in it."""
        return precision if precision in ("fp32", "bf16") else "fp16"

    def device_here(self) -> bool:
        return self._device() is not None

    def host_engine(self, engine: EngineRef) -> EngineRef:
        """ONNX Runtime on the lowered graph: the same types and the same Q/DQ nodes, on the CPU."""
        return replace(engine, kind="onnxruntime", config={}, prebuilt=None)

    def share_weights(
        self, folder: Path, engines: Mapping[str, EngineRef], *, least_bytes: int = LEAST_SHARED
    ) -> Mapping[str, EngineRef]:
        """See ``share_onnx_weights``; an engine that was built has weights of its own."""
        return share_onnx_weights(folder, engines, least_bytes=least_bytes)

    def open_on_host(self, engine: EngineRef, graph: Path, rounded: Rounded, weights: Path | None = None) -> Engine:
        used = self.host_engine(engine)
        return open_engine(used.kind, rounded(graph), used.config)

    def publish(self, folder: Path, index: Mapping[str, Any] | None, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing: no other tool opens these bundles."""

    def measured_with(self, engine: EngineRef, *, on_device: bool) -> str:
        if on_device:
            return f"{engine.kind} on {self._spec.device}"
        package = self.host_engine(engine).kind
        return f"{package} {version(package)} on CPU, the same graph; no {self._spec.device} in this machine"

    def _device(self) -> Device | None:
        """This machine's GPU if it is one the engines run on, and the library is here."""
        gpus = self._spec.compute_capabilities or (PORTABLE if self._spec.kind == "tensorrt-rtx" else ())
        try:
            tensorrt_builder.load_tensorrt(self._spec.kind)
            device = device_info()
        except MtuError:
            return None
        return device if not gpus or device.compute_capability in gpus else None

    def _state(self) -> tuple[EngineState, str | None]:
        if self._spec.built == "board":
            return EngineState.ON_BOARD, None
        if self.device_here():
            return EngineState.BUILT, None
        try:
            return EngineState.BUILT, f"{device_info().name} is none of its GPUs"
        except TargetError as error:
            return EngineState.BUILT, error.message


_MATRIX = "docs.nvidia.com/deeplearning/tensorrt-rtx, support matrix 1.5"
SHARED_BATCH = (
    "a profile from one sample to those of the kind of guidance that takes most (TensorRT's documentation, Working "
    "with Dynamic Shapes). Built for compute capability 8.9 with TensorRT-RTX 1.7.1 by this project, run on no GPU"
)

_RTX_SOURCES = {
    "shared_batch": SHARED_BATCH,
    "opset": "exported at 20, raised to 21 by INT4 and to 22 by bf16, and parsed with TensorRT-RTX 1.7.1 by this "
    "project; TensorRT 11 reads 9 to 25 (NVIDIA's ONNX opset guide)",
    "memory_bytes": "depends on the card; asked of the GPU where one is here",
    "compute_capabilities": f"{_MATRIX}, supported hardware; each was built for by this project with 1.7.1",
}


#: Cards a generation's layers are estimated by. Of fp16's two rates it is the one with sums in fp16, the higher.
RTX_3080 = Speed(
    "GeForce RTX 3080", 119, 238, 760, "NVIDIA Ampere GA102 GPU Architecture whitepaper, GeForce RTX 3080 (dense)"
)
RTX_4090 = Speed(
    "GeForce RTX 4090", 330.3, 660.6, 1008, "NVIDIA Ada GPU Architecture whitepaper, GeForce RTX 4090 (dense)"
)
RTX_5090 = Speed(
    "GeForce RTX 5090",
    419,
    838,
    1792,
    "GeForce RTX 5090 product page: 3352 AI TOPS (FP4, sparse), 1792 GB/s; dense INT8 is a quarter, fp16 an eighth",
)


def _rtx(
    name: str, device: str, capabilities: tuple[str, ...], speed: Speed = RTX_3080, *, fp8: bool = False
) -> TensorRTSpec:
    precisions: tuple[Precision, ...] = ("int8", *(("fp8",) if fp8 else ()), *WEIGHTS_ONLY, "fp16", "bf16", "fp32")
    precision_source = f"{_MATRIX}: fp32, fp16, bf16 and (weights of matrix products) int8, int4 on 8.6, 8.9 and 12.0"
    return TensorRTSpec(
        name=name,
        vendor="NVIDIA (TensorRT-RTX)",
        device=device,
        precisions=precisions,
        opset=22,
        memory_bytes=None,
        shared_batch=None,
        lowering=LOWERING,
        sources={
            **_RTX_SOURCES,
            "precisions": precision_source + ("; fp8 on 8.9 and 12.0" if fp8 else ""),
            "speed": speed.source,
        },
        compute_capabilities=capabilities,
        speed=speed,
    )


RTX_SPEC = _rtx("rtx", "GeForce RTX 30 series and later, one engine for all", ())
RTX_AMPERE_SPEC = _rtx("rtx-ampere", "GeForce RTX 30 series (Ampere)", ("8.6",))
RTX_ADA_SPEC = _rtx("rtx-ada", "GeForce RTX 40 series (Ada Lovelace)", ("8.9",), RTX_4090, fp8=True)
RTX_BLACKWELL_SPEC = _rtx("rtx-blackwell", "GeForce RTX 50 series (Blackwell)", ("12.0",), RTX_5090, fp8=True)

TENSORRT_SPEC = TensorRTSpec(
    name="tensorrt",
    vendor="NVIDIA (TensorRT)",
    device="the NVIDIA GPU of this machine",
    precisions=("int8", *WEIGHTS_ONLY, "fp16", "bf16", "fp32"),
    opset=22,
    memory_bytes=None,
    shared_batch=None,
    lowering=LOWERING,
    sources={
        "shared_batch": SHARED_BATCH,
        "opset": "what this project makes, 22 with bf16: TensorRT has read ONNX 1.17, whose opset that is, since 10.6 "
        "(onnx-tensorrt's changelog), and 11 reads 9 to 25 (NVIDIA's ONNX opset guide)",
        "memory_bytes": _RTX_SOURCES["memory_bytes"],
        "compute_capabilities": "the GPU at hand: TensorRT builds for no other",
        "precisions": "TensorRT 10 support matrix, hardware and precision: fp32, fp16, bf16 and int8 from compute "
        "capability 8.0 on; older GPUs have no bf16. INT4 weights of matrix products: TensorRT 10.0 release notes",
    },
    kind="tensorrt",
)

RTX = TensorRTTarget(RTX_SPEC)
RTX_AMPERE = TensorRTTarget(RTX_AMPERE_SPEC)
RTX_ADA = TensorRTTarget(RTX_ADA_SPEC)
RTX_BLACKWELL = TensorRTTarget(RTX_BLACKWELL_SPEC)
TENSORRT = TensorRTTarget(TENSORRT_SPEC)

#: In the order they are shown.
TARGETS = (RTX, RTX_AMPERE, RTX_ADA, RTX_BLACKWELL, TENSORRT)
