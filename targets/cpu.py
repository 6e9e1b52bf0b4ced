"""The CPU of the machine at hand, through OpenVINO."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mtu_compile.core.atomic import staging
from mtu_compile.core.errors import BuildError, ConfigError
from targets.base import Artifact, Availability, Plan, Precision, TargetSpec
from targets.estimate import estimate
from targets.openvino_ir import INSTALL_HINT, keep_angles_precise, probe_openvino, prove_compiles, read_graph, write_ir

SPEC = TargetSpec(
    name="cpu",
    vendor="Intel (OpenVINO; runs on AMD and Arm CPUs too)",
    device="CPU",
    precisions=("int8", "bf16", "fp32"),
    opset=20,
    memory_bytes=None,
    sources={
        "opset": "exported, read and run with OpenVINO 2026.4.1 by this project; it reads newer ones in part",
        "precisions": "OpenVINO 2026.4.1, CPU device documentation: INFERENCE_PRECISION_HINT and quantised models",
        "memory_bytes": "the machine's own, asked when a build is planned",
    },
)


class CpuTarget:
    """OpenVINO's CPU device.

    ``bf16`` stores float weights as fp16 (half the file; output SQNR against float32 unchanged at 38 to 40 dB), the
    others as f32. Beside INT8 layers the rest runs in f32: on the emoji example bf16 there costs 9.5 dB of SQNR (21.0
    instead of 30.6 dB) and saves 6 % of the time (OpenVINO 2026.4.1, Xeon with AMX).
    """

    def __init__(self, spec: TargetSpec = SPEC) -> None:
        self._spec = spec

    @property
    def spec(self) -> TargetSpec:
        return self._spec

    def probe(self) -> Availability:
        return probe_openvino(self._spec.device)

    def plan(self, graph: Path, *, precision: Precision) -> Plan:
        self._spec.check_precision(precision)
        return estimate(graph, precision=precision, device_bytes=_host_memory())

    def build(self, graph: Path, out: Path, *, precision: Precision) -> Artifact:
        """Build an ONNX graph into ``out/openvino_model.xml`` and ``.bin`` (see ``Target.build``)."""
        self._spec.check_precision(precision)
        availability = self.probe()
        availability.require(self._spec.name)
        config = {"INFERENCE_PRECISION_HINT": self._inference_precision(precision)}
        model = read_graph(graph)
        with staging(out, replace=True) as folder:
            if config["INFERENCE_PRECISION_HINT"] != "f32":
                keep_angles_precise(model)
            path = write_ir(model, folder, fp16_weights=precision == "bf16")
            prove_compiles(path, self._spec.device, config)
            files = tuple(sorted(file.name for file in folder.iterdir()))
        return Artifact(
            kind="openvino",
            path=out / path.name,
            config=config,
            files=tuple(out / name for name in files),
            precision=precision,
            toolchain=f"openvino {availability.version}",
        )

    def companion_precision(self, precision: Precision) -> Precision:
        """bf16 beside bf16 and INT8 where the CPU has it natively, else float32."""
        return "bf16" if precision != "fp32" and "BF16" in self._capabilities() else "fp32"

    def runner(self, artifact: Artifact) -> Any:
        """A Polygraphy runner over a built artefact, with the artefact's own options."""
        if artifact.kind != "openvino":
            raise ConfigError(f"target {self._spec.name!r} cannot run a {artifact.kind!r} artefact")
        self.probe().require(self._spec.name)
        from targets.polygraphy_openvino import OpenVINORunner

        return OpenVINORunner(str(artifact.path), device=self._spec.device, config=dict(artifact.config))

    def _inference_precision(self, precision: Precision) -> str:
        """OpenVINO's name of the float type the engine runs in."""
        if precision != "bf16":
            return "f32"
        if "BF16" not in self._capabilities():
            raise BuildError("this CPU has no native bf16", hint="build with --int8 or --fp32")
        return "bf16"

    def _capabilities(self) -> tuple[str, ...]:
        """What the CPU does natively, in OpenVINO's words (``"BF16"``, ``"INT8"``, …)."""
        import openvino

        return tuple(openvino.Core().get_property(self._spec.device, "OPTIMIZATION_CAPABILITIES"))


def _host_memory() -> int | None:
    """Physical memory of this machine in bytes; ``None`` where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


CPU = CpuTarget()

__all__ = ["CPU", "INSTALL_HINT", "SPEC", "CpuTarget"]
