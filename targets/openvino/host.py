"""How any machine runs an OpenVINO graph on its CPU to measure what precision costs, and compares it with others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mtu_compile.runtime.engine import open_engine
from targets.backend import Backend, installed

#: Unless told so, the CPU plugin rounds the activations of a linear layer with INT8 or INT4 weights to INT8 where it
#: computes in f32: 2 dB of the emoji example's SQNR with INT8 weights (OpenVINO 2026.4.1).
FLOAT_ACTIVATIONS: Mapping[str, str] = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}

#: How any machine with OpenVINO runs an IR to measure what its precision costs, by an engine of kind ``HOST_KIND``: the
#: CPU's own INT8 kernels say nothing about another device's.
HOST_KIND = "openvino-float"
HOST_CONFIG: Mapping[str, str] = {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32", **FLOAT_ACTIVATIONS}


def backend(graph: Path, native: str | None) -> Backend:
    """See ``targets.backend.Offer``; INT8 layers run in INT8 kernels only where the graph is built for them."""
    kind = "openvino" if native == "openvino" else HOST_KIND
    return Backend("OpenVINO CPU, f32", installed("openvino"), lambda: open_engine(kind, graph, HOST_CONFIG))
