"""The CPU of any machine, x86 or Arm, through ONNX Runtime: for boards that no vendor's own runtime serves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtu_compile.bundle import EngineRef
from mtu_compile.core.atomic import staging
from mtu_compile.core.errors import BuildError, TargetError
from mtu_compile.core.progress import Progress
from mtu_compile.runtime import cpu_isa
from mtu_compile.runtime.engine import Engine, open_engine
from targets.backend import installed
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
from targets.onnxruntime.costs import measure
from targets.opset import require_opset
from targets.shared_onnx import share_onnx_weights

GRAPH_NAME = "model.onnx"
INSTALL_HINT = "pip install 'mtu-compile[onnxruntime]'"
KIND = "onnxruntime"

SPEC = TargetSpec(
    name="onnxruntime",
    vendor="Microsoft (ONNX Runtime)",
    device="any CPU, x86 or Arm",
    precisions=("int8", "fp32"),
    opset=22,
    memory_bytes=None,
    scratch=2.0,
    rest="fp32",
    shared_batch=None,
    lowering={"int8": ("mtu::legalise-qdq",)},
    sources={
        "precisions": "ONNX Runtime's documentation, Quantize ONNX Models; the CPU provider computes convolutions and "
        "linear layers in float32 and INT8",
        "opset": "exported at 20, and run at 22 with ONNX Runtime 1.32 by this project",
        "memory_bytes": "the machine's own, asked when a build is planned",
        "shared_batch": "ONNX Runtime's kernels are the same for any size; none is compiled for one",
        "scratch": "chosen, not measured: the arena of ONNX Runtime grows to powers of two by default "
        "(arena_extend_strategy, kNextPowerOfTwo)",
        "lowering": "signed activations in the file: Arm multiplies them as they are, and on x86 ONNX Runtime makes "
        "them unsigned by itself, docs/decisions/0018-a-vendor-is-a-folder.md",
    },
)


class OnnxRuntimeTarget(SpecTarget[TargetSpec]):
    """ONNX Runtime's CPU provider, on this machine and on others: the bundle has one graph for all of them.

    Linear layers run in INT8. A convolution does only between two quantisers, and there is none behind ours, so the
    search for layers that stay float finds INT8 slower there, and gives convolutions back.
    """

    def __init__(self, spec: TargetSpec = SPEC) -> None:
        super().__init__(spec)

    def probe(self) -> Availability:
        try:
            import onnxruntime
        except ImportError as error:
            return Availability(False, KIND, None, INSTALL_HINT, str(error))
        return Availability(
            True, KIND, str(onnxruntime.__version__), INSTALL_HINT, f"{cpu_isa.name()} ({cpu_isa.level()})"
        )

    def memory(self) -> int | None:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError, OSError):
            return None

    def check_graph(self, graph: Path, *, precision: Precision) -> None:
        self._spec.check_precision(precision)
        require_graph(graph)
        require_opset(graph, self._spec)
        if self.probe().ok:
            _prove_loads(graph)

    def build(self, graph: Path, out: Path, *, precision: Precision, progress: Progress | None = None) -> Artifact:
        """Copy ``graph`` to ``out/model.onnx``, and see that it loads (see ``Target.build``)."""
        from mtu_compile.graph import io as graph_io

        self._spec.check_precision(precision)
        available = self.probe()
        available.require(self._spec.name)
        require_graph(graph)
        require_opset(graph, self._spec)
        with staging(out, replace=True) as folder:
            _prove_loads(graph_io.save(graph_io.load(graph), folder / GRAPH_NAME))
            files = tuple(sorted(file.name for file in folder.iterdir()))
        return Artifact(
            kind=KIND,
            path=out / GRAPH_NAME,
            config={},
            files=tuple(out / name for name in files),
            precision=precision,
            toolchain=f"{KIND} {available.version}",
        )

    def companion_precision(self, precision: Precision) -> Precision:
        """Always float32: the CPU provider computes in nothing narrower."""
        return "fp32"

    def layer_costs_in_turn(
        self, graphs: Sequence[tuple[Path, Precision]], *, rounds: int = COST_ROUNDS
    ) -> tuple[LayerCosts, ...] | None:
        """Measured with ONNX Runtime's profile, on this machine."""
        for _, precision in graphs:
            self._spec.check_precision(precision)
        available = self.probe()
        available.require(self._spec.name)
        source = f"{KIND} {available.version} on {available.detail}, measured"
        return measure([graph for graph, _ in graphs], rounds, source)

    def device_here(self) -> bool:
        return self.probe().ok

    def host_engine(self, engine: EngineRef) -> EngineRef:
        return engine

    def share_weights(
        self, folder: Path, engines: Mapping[str, EngineRef], *, least_bytes: int = LEAST_SHARED
    ) -> Mapping[str, EngineRef]:
        """See ``share_onnx_weights``."""
        return share_onnx_weights(folder, engines, least_bytes=least_bytes)

    def open_on_host(self, engine: EngineRef, graph: Path, rounded: Rounded, weights: Path | None = None) -> Engine:
        return open_engine(engine.kind, graph, engine.config)

    def publish(self, folder: Path, index: Mapping[str, Any] | None, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing: no other tool opens these bundles."""

    def measured_with(self, engine: EngineRef, *, on_device: bool) -> str:
        return f"{KIND} {installed(KIND)} on CPU"


def _prove_loads(graph: Path) -> None:
    try:
        open_engine(KIND, graph, {}).close()
    except TargetError as error:
        raise BuildError(error.message, hint=error.hint) from error


ONNXRUNTIME = OnnxRuntimeTarget()

#: In the order they are shown.
TARGETS = (ONNXRUNTIME,)
