"""Intel GPUs, integrated and discrete, through OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mtu_compile.core.errors import BuildError
from mtu_compile.core.progress import Progress
from targets.base import Availability, Precision, TargetSpec
from targets.openvino.engine import reason
from targets.openvino.host import HOST_CONFIG
from targets.openvino.ir import BLOB_NAME, probe_openvino, prove_compiles
from targets.openvino.target import Compiled, OpenVINOTarget

SPEC = TargetSpec(
    name="intel-gpu",
    vendor="Intel (OpenVINO)",
    device="GPU",
    precisions=("int8", "int8-weights", "int4-weights", "fp16", "fp32"),
    opset=21,
    memory_bytes=None,
    shared_batch=1,
    lowering={"int8": ("mtu::legalise-qdq",)},
    sources={
        "precisions": "OpenVINO 2026.4, GPU device documentation: f32, f16 and quantised models; no bf16. Weights "
        "only: this project wrote the IR and ran it on a CPU",
        "opset": "exported at 20, raised to 21 by INT4; read with OpenVINO 2026.4.1 by this project; the importer is "
        "the same for all devices",
        "shared_batch": "chosen, not measured: the plugin compiles kernels for each new size while it runs (OpenVINO "
        "2026.4, Dynamic Shapes on GPU)",
        "memory_bytes": "GPU_DEVICE_TOTAL_MEM_SIZE of the device, where it is; an integrated GPU shares the machine's",
    },
)


class IntelGpuTarget(OpenVINOTarget):
    """OpenVINO's GPU device, which takes Intel GPUs only.

    The IR is the same wherever it is written. Where a GPU is, its compiler runs too and the blob goes into the bundle;
    elsewhere the IR is proved to compile for the CPU, and the board compiles it when it first loads it.
    """

    def __init__(self, spec: TargetSpec = SPEC) -> None:
        super().__init__(spec)

    def probe(self) -> Availability:
        """OpenVINO is all that a build needs; ``detail`` names the GPU, if there is one."""
        availability = probe_openvino("CPU")
        if not availability.ok:
            return availability
        detail = probe_openvino(self._spec.device).detail if self.device_here() else "no Intel GPU on this machine"
        return Availability(True, "openvino", availability.version, availability.install_hint, detail)

    def inference_precision(self, precision: Precision) -> str:
        return "f32" if precision == "fp32" else "f16"

    def companion_precision(self, precision: Precision) -> Precision:
        return "fp32" if precision == "fp32" else "fp16"

    def memory(self) -> int | None:
        if not self.device_here():
            return None
        import openvino

        return int(openvino.Core().get_property(self._spec.device, "GPU_DEVICE_TOTAL_MEM_SIZE"))

    def compile_ir(self, path: Path, config: Mapping[str, str], progress: Progress) -> Compiled:
        if not self.device_here():
            options = {key: value for key, value in HOST_CONFIG.items() if key != "device"}
            prove_compiles(path, HOST_CONFIG["device"], options)
            return Compiled(None, reason="no Intel GPU on this machine")
        return Compiled(_compile_blob(path, self._spec.device, config))


def _compile_blob(path: Path, device: str, config: Mapping[str, str]) -> Path:
    """Compile the IR on the GPU and write the blob beside it; it only fits the driver that made it."""
    import openvino

    from targets.openvino.engine import fractional_timesteps

    blob = path.with_name(BLOB_NAME)
    options = {key: value for key, value in config.items() if key != "device"}
    core = openvino.Core()
    try:
        model = core.read_model(str(path))
        fractional_timesteps(model)
        blob.write_bytes(core.compile_model(model, device, options).export_model().getbuffer())
    except RuntimeError as error:
        raise BuildError(f"openvino cannot compile {path.name} for {device}: {reason(error)}") from error
    return blob


INTEL_GPU = IntelGpuTarget()

#: In the order they are shown.
TARGETS = (INTEL_GPU,)
