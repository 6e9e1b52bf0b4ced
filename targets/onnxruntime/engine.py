"""ONNX Runtime on the CPU: how a build machine runs a graph whose device it has not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtu_compile.core.errors import TargetError, ToolchainMissing
from mtu_compile.runtime.engine import Array, EngineBase, TensorSpec

#: ONNX Runtime's names of the types a graph's border has.
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


class OnnxRuntimeEngine(EngineBase):
    """An ONNX graph on ONNX Runtime's CPU provider; it has no options and nothing is built for it in advance.

    See ``open_engine`` for what is raised.
    """

    def __init__(
        self, path: Path, config: Mapping[str, str], prebuilt: Path | None = None, cache: Path | None = None
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ToolchainMissing(
                f"the graph runs on ONNX Runtime here, which is not installed ({error})",
                hint="pip install 'mtu-compile[compile]'",
            ) from error
        super().__init__(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Unless told so, it rounds the activations of linear layers with INT8 or INT4 weights to INT8 (1.32).
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own exceptions have no common base but this
            raise TargetError(f"onnxruntime cannot load {self.name}: {_first_line(error)}") from error
        self.inputs = {spec.name: spec for spec in map(_spec, session.get_inputs())}
        self.outputs = {spec.name: spec for spec in map(_spec, session.get_outputs())}
        self._session: Any = session

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        try:
            results = self._session.run(list(self.outputs), dict(inputs))
        except Exception as error:
            raise TargetError(f"onnxruntime cannot run {self.name}: {_first_line(error)}") from error
        return dict(zip(self.outputs, results, strict=True))

    def _free(self) -> None:
        del self._session


def _spec(value: Any) -> TensorSpec:
    if value.type not in _DTYPES:
        raise TargetError(f"the graph has {value.name!r} of type {value.type}, which its border may not have")
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return TensorSpec(value.name, shape, np.dtype(_DTYPES[value.type]))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
