"""The CPU of the machine at hand, through OpenVINO."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace

from mtu_compile.bundle import EngineRef
from mtu_compile.core.errors import BuildError
from mtu_compile.core.host_memory import host_memory
from mtu_compile.runtime import cpu_isa
from targets.base import Availability, Precision, TargetSpec
from targets.openvino.target import OpenVINOTarget

SPEC = TargetSpec(
    name="cpu",
    vendor="Intel (OpenVINO; runs on AMD and Arm CPUs too)",
    device="CPU",
    precisions=("int8", "int8-weights", "int4-weights", "bf16", "fp32"),
    opset=21,
    memory_bytes=None,
    scratch=1.75,
    rest="bf16",
    shared_batch=None,
    unpacks_weights=True,
    lowering={"int8": ("mtu::legalise-qdq", "mtu::uint8-activations", "mtu::fit-int16-sums")},
    sources={
        "lowering": "measured with OpenVINO 2026.4.1 at every instruction set it runs on, "
        "docs/decisions/0011-int8-on-every-cpu.md",
        "shared_batch": "measured with OpenVINO 2026.4.1, docs/decisions/0019-batch-of-a-shared-engine.md",
        "unpacks_weights": "OpenVINO 2026.4.1, memory of a network of Stable Diffusion 1.5's size, docs/accuracy.md",
        "opset": "exported at 20, raised to 21 by INT4; read and run with OpenVINO 2026.4.1 by this project; it reads "
        "newer ones in part",
        "precisions": "OpenVINO 2026.4.1, CPU device documentation: INFERENCE_PRECISION_HINT and quantised models. "
        "Weights only: run by this project; linear layers keep INT8 and INT4 weights, convolutions unpack them",
        "memory_bytes": "the machine's own, asked when a build is planned",
        "scratch": "OpenVINO 2026.4.1, docs/decisions/0008-planner.md: 1.04 to 1.13 of the estimate on a Xeon with AMX "
        "and as the lesser CPUs it stands in for, 1.55 on a Zen 4",
    },
)

#: x86 in the words of ``platform.machine``. Elsewhere (Arm) signed activations are right and unsigned ones are not:
#: openvinotoolkit/openvino issues 36764 and 37351.
_X86 = frozenset({"x86_64", "AMD64", "i386", "i686"})


def spec_for(machine: str) -> TargetSpec:
    """The target's facts on a machine, in the words of ``platform.machine``."""
    if machine in _X86:
        return SPEC
    signed: Mapping[Precision, tuple[str, ...]] = {"int8": ("mtu::legalise-qdq",)}
    return replace(SPEC, lowering=signed)


class CpuTarget(OpenVINOTarget):
    """OpenVINO's CPU device.

    ``bf16`` stores float weights as fp16 (half the file; output SQNR against float32 unchanged at 38 to 40 dB), the
    others as f32. Beside INT8 layers the rest runs in bf16 where the CPU has it natively, else in f32.

    INT8 and INT4 weights make the file smaller and nothing else: this plugin unpacks most of them, and for a UNet of
    Stable Diffusion 1.5's size takes twice the memory of bf16 and no less time (OpenVINO 2026.4.1).
    """

    def __init__(self, spec: TargetSpec | None = None) -> None:
        super().__init__(spec or spec_for(platform.machine()))

    def probe(self) -> Availability:
        """As for every device, with the instruction set: layers are timed here, and a manifest says where."""
        found = super().probe()
        return replace(found, detail=f"{found.detail} ({cpu_isa.level()})") if found.ok else found

    def companion_precision(self, precision: Precision) -> Precision:
        """bf16 beside bf16 and INT8 where the CPU has it natively, else float32."""
        return "bf16" if precision != "fp32" and "BF16" in self._capabilities() else "fp32"

    def host_engine(self, engine: EngineRef) -> EngineRef:
        return engine

    def stand_in(self, precision: Precision) -> float:
        return 0.0

    def inference_precision(self, precision: Precision) -> str:
        native = "BF16" in self._capabilities()
        if precision == "bf16" and not native:
            raise BuildError("this CPU has no native bf16", hint="build with --int8 or --fp32")
        return "bf16" if native and precision != "fp32" else "f32"

    def memory(self) -> int | None:
        return host_memory()

    def _capabilities(self) -> tuple[str, ...]:
        """What the CPU does natively, in OpenVINO's words (``"BF16"``, ``"INT8"``, …)."""
        import openvino

        found = tuple(openvino.Core().get_property(self._spec.device, "OPTIMIZATION_CAPABILITIES"))
        # OpenVINO asks the CPU, whatever oneDNN was told to leave unused.
        return found if cpu_isa.native_bf16() else tuple(one for one in found if one != "BF16")


CPU = CpuTarget()

#: In the order they are shown.
TARGETS = (CPU,)
