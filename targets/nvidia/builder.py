"""ONNX → TensorRT engine: one path for ``tensorrt`` 10.3 to 11.4 and for ``tensorrt_rtx``.

Networks are strongly typed: precision is what the graph's types and Q/DQ nodes say and nothing else, so that no builder
flag for a precision is needed (they are gone in 11). The library is imported when it is asked for; this module
runs on a board, with nothing of the compiler.

What differs between the versions, and how it is met:

* 10.x wants ``NetworkDefinitionCreationFlag.STRONGLY_TYPED``; 11 ignores it (and may drop it: it is looked up).
* TensorRT-RTX builds for GPUs that are named, and needs none; TensorRT builds for the GPU at hand.
* ``set_compute_capability`` says ``False`` where it refuses, and the build would go on for other GPUs.
* TensorRT-RTX has no timing cache: since 1.2 the calls are there and do nothing.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import BuildError, ConfigError, ModelError, TargetError
from mtu_compile.core.progress import Advance, ignore
from mtu_compile.runtime.builder import Built
from targets.nvidia.cuda import device_info
from targets.nvidia.library import (
    Kind,
    collector,
    first_error,
    first_reason,
    in_thread,
    load_tensorrt,
    monitor,
    no_collection,
    version,
)
from targets.nvidia.recipe import Recipe

__all__ = ["Built", "Kind", "Recipe", "build_engine", "check_graph", "load_tensorrt", "version"]

#: Warnings of the parser after which the engine would compute something else than the graph: uint8 Q/DQ are read as
#: int8, which cuts off the upper half of what a uint8 quantiser lets through (TensorRT-RTX 1.7.1).
_WRONG = ("Defaulting to INT8 instead",)


def check_graph(graph: Path, kind: str) -> None:
    """Ask the library's ONNX parser whether it takes ``graph``; needs no GPU.

    Raises:
        BuildError: it does not; the message names the nodes.
        ModelError: there is no such file, or it holds no graph.
        ToolchainMissing: the library is not installed.
    """
    trt = load_tensorrt(kind)
    _require_file(graph)
    in_thread(lambda: _parse(trt, graph, collector(trt)), threading.Event())


def build_engine(
    graph: Path,
    out: Path,
    recipe: Recipe,
    *,
    kind: str,
    timing_cache: Path | None = None,
    advance: Advance | None = None,
) -> Built:
    """Build ``graph`` into the engine file ``out``, which appears whole or not at all.

    Building the same graph twice with TensorRT-RTX gives the same bytes.

    Args:
        graph: a static ONNX file, or one with a profile for each input of dynamic shape; weights may lie beside it.
        out: file to write; one that exists is replaced.
        recipe: see ``Recipe``.
        kind: "tensorrt" or "tensorrt-rtx".
        timing_cache: file with what an earlier build measured; one of another device or version, or a damaged one, is
            not used. It is written anew after the build, also after one that was cut short, so that the next one need
            not measure again.
        advance: told of every step of the builder; their number is not known beforehand.

    Raises:
        BuildError: the library refused the graph; the message names the ONNX nodes, or says what it said.
        ConfigError: a profile that does not fit the graph.
        TargetError: (tensorrt) the GPU at hand is none the recipe names, or there is none.
        ModelError, ToolchainMissing: as ``check_graph``.
        KeyboardInterrupt: Ctrl-C; the build stops at its next step.
    """
    trt = load_tensorrt(kind)
    _require_file(graph)
    if kind == "tensorrt":
        _require_gpu(recipe)
    stop = threading.Event()
    started = time.monotonic()
    with atomic_file(out) as temporary:
        plan = in_thread(lambda: _build(trt, graph, recipe, timing_cache, advance or ignore, stop), stop)
        with temporary.open("wb") as file:
            file.write(memoryview(plan))
    return Built(out, time.monotonic() - started, out.stat().st_size, f"{trt.__name__} {trt.__version__}")


def _build(
    trt: Any, graph: Path, recipe: Recipe, timing_cache: Path | None, advance: Advance, stop: threading.Event
) -> Any:
    """The serialised engine, as a buffer that the library owns."""
    logger = collector(trt)
    builder, network = _parse(trt, graph, logger)
    config = builder.create_builder_config()
    # Float32 means float32: the layers that were kept in it were kept for their precision, and TF32 has that of fp16.
    config.clear_flag(trt.BuilderFlag.TF32)
    if recipe.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_bytes)
    if recipe.optimization_level is not None:
        config.builder_optimization_level = recipe.optimization_level
    _add_profile(builder, network, config, recipe)
    if hasattr(config, "num_compute_capabilities"):
        _choose_gpus(trt, config, recipe)
    watcher = monitor(trt, advance, stop)
    config.progress_monitor = watcher
    with _timing_cache(config, timing_cache):
        plan = builder.build_serialized_network(network, config)
    if watcher.error is not None:
        raise watcher.error
    if plan is None and not stop.is_set():
        raise BuildError(
            f"{trt.__name__} {trt.__version__} cannot build {graph.name}: {first_error(logger.messages)}",
            hint=_build_hint(logger.messages),
        )
    return plan


def _parse(trt: Any, graph: Path, logger: Any) -> tuple[Any, Any]:
    """A builder, and the network it read from ``graph``."""
    with no_collection():
        builder = trt.Builder(logger)
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(graph))
    problems = [_describe(parser.get_error(index)) for index in range(parser.num_errors)]
    problems += [first_reason(message) for _, message in logger.messages if any(words in message for words in _WRONG)]
    logger.node = ""  # what follows is about the engine
    if problems or not parsed:
        listed = "; ".join(dict.fromkeys(problems)) or first_error(logger.messages)
        raise BuildError(f"{trt.__name__} {trt.__version__} does not take {graph.name}: {listed}")
    if network.num_outputs == 0:  # protobuf reads almost any bytes as a model without contents
        raise ModelError(f"{graph} is not an ONNX file or holds no graph", hint="export the model again")
    return builder, network


def _describe(error: Any) -> str:
    """Node and reason of one of the parser's errors."""
    index, name, operator = error.node(), error.node_name(), error.node_operator()
    described = (f"node {name!r}" if name else f"node number {index}") + (f" ({operator})" if operator else "")
    reason = first_reason(error.desc())
    if reason in ("", "false") or "Plugin not found" in reason:  # its ways of saying no
        reason = "this operation is not supported"
    return f"{described}: {reason}" if index >= 0 else reason


def _add_profile(builder: Any, network: Any, config: Any, recipe: Recipe) -> None:
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    dynamic = {tensor.name for tensor in tensors if any(size < 0 for size in tensor.shape)}
    if missing := dynamic - recipe.profiles.keys():
        raise ConfigError(f"input {min(missing)!r} has a dynamic shape and no profile says which it will have")
    if unknown := recipe.profiles.keys() - dynamic:
        raise ConfigError(f"there is a profile for {min(unknown)!r}, which is no input of dynamic shape")
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name, (least, usual, most) in recipe.profiles.items():
        profile.set_shape(name, least, usual, most)
    if config.add_optimization_profile(profile) < 0:
        raise ConfigError(f"the shapes given for {', '.join(recipe.profiles)} contradict each other or the graph")


def _choose_gpus(trt: Any, config: Any, recipe: Recipe) -> None:
    """TensorRT-RTX: name the GPUs the engine is for, of which none need be here."""
    if not recipe.compute_capabilities:
        return
    config.num_compute_capabilities = len(recipe.compute_capabilities)  # makes room; without it every one is refused
    for index, capability in enumerate(recipe.compute_capabilities):
        member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
        if member is None or not config.set_compute_capability(member, index):
            known = sorted(int(name[2:]) for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name))
            raise BuildError(
                f"{trt.__name__} {trt.__version__} does not build for compute capability {capability}",
                hint=f"it builds for {', '.join(f'{number // 10}.{number % 10}' for number in known)}",
            )


@contextlib.contextmanager
def _timing_cache(config: Any, path: Path | None) -> Iterator[None]:
    """Use and keep the measurements in ``path``; nothing about it can fail a build."""
    if path is None:
        yield
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX: nothing is measured, so nothing is kept
        try:
            before = path.read_bytes()
        except OSError:
            before = b""
        cache = config.create_timing_cache(before)
        # Never force a cache on a device it was not measured on: ignore_mismatch stays False.
        if cache is None or not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, RuntimeError):
                cache = config.get_timing_cache()
                after = b"" if cache is None else bytes(cache.serialize())
                if after and after != before:
                    with atomic_file(path) as temporary:
                        temporary.write_bytes(after)


def _build_hint(messages: list[tuple[str, str]]) -> str | None:
    text = " ".join(message for _, message in messages)
    if "workspace" in text:
        return "give it a larger workspace limit"
    if "out of memory" in text.lower() or "FAILED_ALLOCATION" in text:
        return "free the device's memory (on a Jetson: end the desktop), or build a smaller picture size or INT8"
    return None


def _require_gpu(recipe: Recipe) -> None:
    device = device_info()
    wanted = recipe.compute_capabilities
    if wanted and device.compute_capability not in wanted:
        raise TargetError(
            f"this is built for compute capability {', '.join(wanted)}, and {device.name} has "
            f"{device.compute_capability}",
            hint="compile the model for this device",
        )


def _require_file(graph: Path) -> None:
    if not graph.is_file():
        raise ModelError(f"graph {graph} does not exist", hint="export the model first")
