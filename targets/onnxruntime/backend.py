"""ONNX Runtime among the backends that are compared with each other."""

from __future__ import annotations

from pathlib import Path

from mtu_compile.runtime.engine import open_engine
from targets.backend import Backend, installed


def backend(graph: Path, native: str | None) -> Backend | None:
    """See ``targets.backend.Offer``; only ONNX files."""
    if graph.suffix != ".onnx":
        return None
    version = installed("onnxruntime")
    return Backend("ONNX Runtime CPU", version, lambda: open_engine("onnxruntime", graph, {}), leads=True)
