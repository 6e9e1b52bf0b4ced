"""Intel NPUs, through OpenVINO: the blob is compiled here, without an NPU; the IR goes beside it.

A board whose driver does not take the blob compiles the IR itself (``OpenVINOEngine``). A new platform is a new spec.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mtu_compile.bundle import EngineState, Estimate
from mtu_compile.core.errors import BuildError, ToolchainMissing
from mtu_compile.core.progress import Progress
from targets.base import COST_ROUNDS, GIB, Availability, LayerCosts, Precision, TargetSpec
from targets.npu.compiler import SETUP, Blob, compile_blob, find_compiler
from targets.npu.costs import scheduled
from targets.openvino.costs import IR
from targets.openvino.engine import for_device, reason
from targets.openvino.ir import BLOB_NAME, IR_NAME, probe_openvino
from targets.openvino.names import name_nodes
from targets.openvino.target import Compiled, OpenVINOTarget

#: The compiler's estimate of every layer, beside the IR and the blob.
LAYERS_NAME = "openvino_model.npu.json"

_MEMORY = "system memory, which the NPU shares; how much of it the driver gives is the machine's own"
_SHARED = (
    "learn.microsoft.com, Calculating Graphics Memory: half of the system's memory, for compute devices (MCDM) as for "
    "graphics; taken for Linux as well"
)
_COPILOT = "Microsoft's requirements of Copilot+ PCs, of which this NPU is part: 16 GB"
_LAPTOP = "laptops with these processors are sold from 8 GB on"
_PLATFORMS = "openvino.intel_npu properties, NPU_PLATFORM (OpenVINO 2026.4.1); each was compiled for by this project"


@dataclass(frozen=True)
class IntelNpuSpec(TargetSpec):
    """An Intel NPU; ``platform`` is its name in OpenVINO, ``processors`` where it is found."""

    platform: str = ""
    processors: str = ""


# No ``lowering``: this compiler, unlike the others, likes attention as NNCF leaves it, with query·key in INT8 (its
# estimates for the SD 1.5-sized UNet on platform 4000: 87.9 ms so, 90.4 ms without).


def _spec(
    name: str, platform: str, processors: str, source: str, least: int = 16, least_source: str = _COPILOT
) -> IntelNpuSpec:
    return IntelNpuSpec(
        name=name,
        vendor="Intel (OpenVINO)",
        device="NPU",
        precisions=("int8", "int8-weights", "fp16"),
        opset=20,
        memory_bytes=None,
        shared=0.5,
        least_memory_bytes=least * GIB,
        shared_batch=1,
        sources={
            "shared_batch": "the compiler takes static shapes (OpenVINO 2026.4, NPU device documentation)",
            "platform": _PLATFORMS,
            "processors": source,
            "precisions": "OpenVINO 2026.4, NPU device documentation: f16 and quantised models; no f32, no bf16. INT8 "
            "weights: compiled for by this project; INT4 left out, as its blobs came out larger and slower than those",
            "opset": "exported and read with OpenVINO 2026.4.1 by this project; one importer for all devices",
            "memory_bytes": _MEMORY,
            "shared": _SHARED,
            "least_memory_bytes": least_source,
        },
        platform=platform,
        processors=processors,
    )


_MTL = "openvinotoolkit/openvino, src/plugins/intel_npu/README.md: NPU 3720 is Meteor Lake's and Arrow Lake's"
_LNL = "openvinotoolkit/openvino, src/plugins/intel_npu/README.md: NPU 4000 is Lunar Lake's"
_PTL = "openvinotoolkit/openvino#33595: NPU 5010 is Panther Lake's"

SPEC = _spec("intel-npu", "4000", "Core Ultra 200V (Lunar Lake)", _LNL)
SPEC_3720 = _spec("intel-npu-3720", "3720", "Core Ultra 100 and 200S/H (Meteor Lake, Arrow Lake)", _MTL, 8, _LAPTOP)
SPEC_4000 = _spec("intel-npu-4000", "4000", "Core Ultra 200V (Lunar Lake)", _LNL)
SPEC_5010 = _spec("intel-npu-5010", "5010", "Core Ultra series 3 (Panther Lake)", _PTL)


class IntelNpuTarget(OpenVINOTarget):
    """One platform of Intel's NPU.

    Args:
        spec: which.
        blob: compile the blob here; without, a bundle carries the IR alone and each machine compiles it on first use.
    """

    float_activations: Mapping[str, str] = MappingProxyType({})  # the plugin has no such property, and needs none

    def __init__(self, spec: IntelNpuSpec = SPEC, *, blob: bool = True) -> None:
        super().__init__(spec)
        self._npu = spec
        self._blob = blob

    def probe(self) -> Availability:
        """Whether the IR can be written and, if blobs are made, whether a compiler was found; ``detail`` says which."""
        availability = probe_openvino("CPU")
        if not availability.ok or not self._blob:
            return availability
        try:
            provider = find_compiler()
        except ToolchainMissing as error:
            return Availability(False, "Intel's NPU compiler", None, error.hint or SETUP, error.message)
        return Availability(True, "openvino", availability.version, SETUP, provider.how)

    def inference_precision(self, precision: Precision) -> str:
        return "f16"

    def half_weights(self, precision: Precision) -> bool:
        """Always: the NPU has no f32, and a smaller file computes the same."""
        return True

    def companion_precision(self, precision: Precision) -> Precision:
        return "fp16"

    def memory(self) -> int | None:
        if not self.device_here():
            return None
        import openvino

        return int(openvino.Core().get_property("NPU", "NPU_DEVICE_TOTAL_MEM_SIZE"))

    def layer_costs_in_turn(
        self, graphs: Sequence[tuple[Path, Precision]], *, rounds: int = COST_ROUNDS
    ) -> tuple[LayerCosts, ...] | None:
        """By the compiler's cost model, from the schedule it makes; none if blobs are not made here.

        Takes as long as compiling the graphs: two minutes each for Stable Diffusion 1.5.
        """
        with self.written(graphs) as irs:
            return tuple(self._estimate(ir) for ir in irs) if self._blob else None

    def _estimate(self, ir: IR) -> LayerCosts:
        import openvino

        xml = ir.path.parent / "npu" / IR_NAME
        _write_for_npu(ir.path, xml)
        blob = compile_blob(xml, ir.path.with_name(BLOB_NAME), platform=self._npu.platform)
        return scheduled(openvino.Core().read_model(str(xml)), blob.report, ir.layers, blob.source)

    def compile_ir(self, path: Path, config: Mapping[str, str], progress: Progress) -> Compiled:
        """Compile the blob, beside ``path``, for the inputs ``OpenVINOEngine`` runs it with."""
        reason = None if self.device_here() else "no Intel NPU on this machine"
        if not self._blob:
            return Compiled(None, EngineState.AT_FIRST_USE, reason)
        with tempfile.TemporaryDirectory(prefix=".npu-", dir=path.parent) as work:
            # what a person knows the network by, not the name of a folder on its way to being one
            xml = Path(work) / path.parent.name.lstrip(".").split(".")[0] / IR_NAME
            _write_for_npu(path, xml)
            blob = compile_blob(xml, path.with_name(BLOB_NAME), platform=self._npu.platform, progress=progress)
        path.with_name(LAYERS_NAME).write_text(_layers(blob), encoding="utf-8")
        estimate = None
        if blob.estimate_ms is not None:
            estimate = Estimate(source=blob.source, latency_ms=round(blob.estimate_ms, 4), **blob.report.summary())
        return Compiled(blob.path, EngineState.BUILT, reason, estimate)


def _write_for_npu(path: Path, xml: Path) -> None:
    """The IR with the inputs it has on an NPU (see ``for_device``); every shape in it has to be fixed by then."""
    import openvino

    try:
        model = openvino.Core().read_model(str(path))
        for_device(model, "NPU")
        for port in (*model.inputs, *model.outputs):
            if port.partial_shape.is_dynamic:
                raise BuildError(f"{port.any_name!r} of {path.parent.name} has a dynamic shape, {port.partial_shape}")
        xml.parent.mkdir()
        name_nodes(model)
        openvino.save_model(model, str(xml), compress_to_fp16=False)  # what is to be fp16 is so already
    except RuntimeError as error:
        raise BuildError(f"openvino cannot prepare {path.parent.name} for the NPU: {reason(error)}") from error


def _layers(blob: Blob) -> str:
    """The estimated schedule as JSON: a header, and a line a layer."""
    head: dict[str, Any] = {"source": blob.source, "latency_ms": blob.estimate_ms, **blob.report.summary()}
    lines = ",\n".join(f"  {json.dumps(asdict(layer))}" for layer in blob.report.layers)
    return f'{json.dumps(head, indent=1)[:-2]},\n "layers": [\n{lines}\n ]\n}}\n'


INTEL_NPU = IntelNpuTarget(SPEC)
INTEL_NPU_3720 = IntelNpuTarget(SPEC_3720)
INTEL_NPU_4000 = IntelNpuTarget(SPEC_4000)
INTEL_NPU_5010 = IntelNpuTarget(SPEC_5010)

#: In the order they are shown.
TARGETS = (INTEL_NPU, INTEL_NPU_3720, INTEL_NPU_4000, INTEL_NPU_5010)
