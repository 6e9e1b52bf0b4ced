"""ONNX Runtime on the CPU: a target of its own, and how a build machine runs a graph whose device it has not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtu_compile.core.errors import ConfigError, TargetError, ToolchainMissing, first_line
from mtu_compile.runtime import cpu_isa
from mtu_compile.runtime.engine import Array, EngineBase, TensorSpec

#: ONNX Runtime's names of the types a graph's border has.
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}

#: Instruction sets that add products of bytes in 32 bits (``cpu_isa.LEVELS``).
VNNI = ("AVX2_VNNI", "AVX512_CORE_VNNI", "AVX512_CORE_BF16", "AVX512_CORE_AMX")

#: What ONNX Runtime is kept from: it makes a Gemm of a product and its bias before it looks for quantised products, and
#: a Gemm is multiplied in INT8 only if its bias is quantised, too (1.32).
DISABLED = ["MatMulAddFusion"]


class OnnxRuntimeEngine(EngineBase):
    """An ONNX graph on ONNX Runtime's CPU provider; it takes no options, and nothing is built for it in advance.

    The graph itself says where its weights are.

    See ``open_engine`` for what is raised.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, str],
        prebuilt: Path | None = None,
        cache: Path | None = None,
        weights: Path | None = None,
    ) -> None:
        try:
            import onnxruntime  # noqa: F401
        except ImportError as error:
            raise ToolchainMissing(
                f"the graph runs on ONNX Runtime here, which is not installed ({error})",
                hint="pip install 'mtu-compile[onnxruntime]'",
            ) from error
        if unknown := sorted(config):
            raise ConfigError(f"an engine may not set the ONNX Runtime option {unknown[0]!r}")
        super().__init__(path)
        session = open_session(path, session_options())
        self.inputs = {spec.name: spec for spec in map(_spec, session.get_inputs())}
        self.outputs = {spec.name: spec for spec in map(_spec, session.get_outputs())}
        self.device = f"{', '.join(session.get_providers())}: {cpu_isa.name()}"
        self._session: Any = session

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = self._session.run(list(self.outputs), dict(inputs))
        except Exception as error:
            raise TargetError(f"onnxruntime cannot run {self.name}: {first_line(error)}") from error
        return dict(zip(self.outputs, results, strict=True))

    def _free(self) -> None:
        del self._session


def session_options() -> Any:
    """How a graph is computed, on this very CPU, as it says."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Unless told so, it rounds the activations of linear layers with INT8 or INT4 weights to INT8 (1.32).
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if saturates(cpu_isa.level()):
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def saturates(level: str) -> bool:
    """Whether a CPU at an instruction set (``cpu_isa.level``) adds products of bytes in 16 bits, which overflow.

    x86 CPUs without VNNI do. There ONNX Runtime is told to multiply unsigned bytes with unsigned ones, whose kernel
    adds in 32 bits: 140 dB instead of 7 on a product made to overflow (1.32, a Haswell imitated by QEMU). Elsewhere
    that would cost three to four times the time for nothing. A CPU that is not known has to be patient.
    """
    return level in (*cpu_isa.LEVELS, cpu_isa.BELOW, "unknown") and level not in VNNI


def open_session(path: Path, options: Any) -> Any:
    """The graph on the CPU provider; ``TargetError`` if it is refused."""
    import onnxruntime

    cpu = ["CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=cpu, disabled_optimizers=DISABLED)
    except Exception as error:  # its own exceptions have no common base but this
        where = f"{path.parent.name}/{path.name}"
        raise TargetError(f"onnxruntime cannot load {where}: {first_line(error)}") from error


def _spec(value: Any) -> TensorSpec:
    if value.type not in _DTYPES:
        raise TargetError(f"the graph has {value.name!r} of type {value.type}, which its border may not have")
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(value.name, shape, np.dtype(_DTYPES[value.type]))
