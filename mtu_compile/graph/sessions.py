"""ONNX Runtime on the build machine: with little memory, or node by node as a graph is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnxruntime


def lean_options(*, in_files: bool, optimise: bool = True) -> Any:
    """Options of a session that computes with weights where they lie.

    ONNX Runtime maps weights that are in external data, but copies them all the same where it lays them out anew: a
    second time for its matrix products ("prepacking"), and a third for convolutions with blocks of channels, which
    optimisations of the highest level bring. Without, a graph of 0.7 GB opens in 0.01 s instead of 1.7 s, and has
    21 MB of its own instead of 728; a run takes about a third longer (1.32, one thread). Its arena would keep what the
    largest run needed.

    Args:
        in_files: the weights are in external data; without there is nothing to be saved by leaving them as they are.
        optimise: fuse operators; off where every value of the graph has to be there.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    levels = onnxruntime.GraphOptimizationLevel
    if in_files:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = levels.ORT_ENABLE_EXTENDED
    if not optimise:
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    return options


def open_as_written(
    graph: Path | bytes, *, threads: int = 0, entries: dict[str, str] | None = None
) -> onnxruntime.InferenceSession:
    """A session of ONNX Runtime on the CPU without its optimisations, which would fuse or fold what is looked at.

    Args:
        graph: file, or the bytes of one.
        threads: of one node; 0 for as many as there are cores.
        entries: further settings, as ``add_session_config_entry`` takes them.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors come as exceptions
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    source = graph if isinstance(graph, bytes) else str(graph)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
