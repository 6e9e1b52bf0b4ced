"""Engines of TensorRT and TensorRT-RTX on the GPU of this machine, their memory through ``cuda-python``.

A step is: inputs into page-locked memory, one launch that copies them to the GPU, computes and copies outputs back.
With TensorRT the launch is a CUDA graph captured here. TensorRT-RTX compiles its kernels when an engine is opened and
captures by itself (its ``CudaGraphStrategy``; a capture from outside would keep kernels it means to replace), so that
only the computing is a graph there. What it compiled is kept beside the bundle's other locally built files.

Not run yet: written where there is no NVIDIA GPU, against the published Python bindings.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mtu_compile.bundle import MANIFEST
from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import TargetError
from mtu_compile.runtime.engine import Array, EngineBase, TensorSpec
from targets.nvidia.cuda import Device, call, device_info, load_cudart
from targets.nvidia.library import Kind, collector, first_error, load_tensorrt, no_collection
from targets.nvidia.recipe import Recipe

#: TensorRT's names of the types a graph's border may have; the others have no NumPy type.
_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT64": np.int64,
    "INT32": np.int32,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}


@dataclass(frozen=True)
class _Buffer:
    """An input or output in both memories.

    Attributes:
        host: page-locked, of the tensor's shape and dtype.
        device: address on the GPU.
        is_input: copied to the GPU before the computation, and not from it after.
    """

    host: Array
    device: int
    is_input: bool


class TensorRTEngine(EngineBase):
    """An engine of TensorRT itself, built on this machine; see ``open_engine`` for the arguments and what is raised.

    It has weights of its own, whatever file its graph has them in.

    Attributes:
        captured: a step is one CUDA graph. It is ``False`` if the network cannot be captured; results are the same.
    """

    kind: ClassVar[Kind] = "tensorrt"
    captured: bool = False

    def __init__(
        self,
        path: Path,
        config: Mapping[str, str],
        prebuilt: Path | None = None,
        cache: Path | None = None,
        weights: Path | None = None,
    ) -> None:
        recipe = Recipe.from_config(config)
        super().__init__(path)
        self._cache = cache
        root = next((folder for folder in path.parents if (folder / MANIFEST).is_file()), None)
        self._build_hint = f"mtu-compile board build {root or 'BUNDLE'}"
        trt = load_tensorrt(self.kind)
        self._cudart = load_cudart()
        self._require(device_info(), recipe)
        if prebuilt is None:
            raise TargetError(f"no engine was built for {self.name}", hint=self._build_hint)
        with ExitStack() as resources:
            self._step = self._open(trt, path, prebuilt, resources)
            self._resources = resources.pop_all()

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        for name in self.inputs:
            np.copyto(self._buffers[name].host, inputs[name])
        self._step()
        return {name: self._buffers[name].host.copy() for name in self.outputs}

    def _free(self) -> None:
        del self._step
        self._buffers.clear()
        self._resources.close()

    def _require(self, device: Device, recipe: Recipe) -> None:
        wanted = recipe.compute_capabilities
        if wanted and device.compute_capability not in wanted:
            raise TargetError(
                f"{self.name} is for GPUs of compute capability {', '.join(wanted)}, and {device.name} has "
                f"{device.compute_capability}",
                hint="compile the model for this GPU",
            )

    def _open(self, trt: Any, path: Path, prebuilt: Path, resources: ExitStack) -> Callable[[], None]:
        """Do everything that is done once, and return a step; what has to be undone goes on ``resources``."""
        cudart = self._cudart
        logger = collector(trt)
        with no_collection():
            runtime = trt.Runtime(logger)
        try:
            engine = runtime.deserialize_cuda_engine(prebuilt.read_bytes())
        except OSError as error:
            raise TargetError(f"{prebuilt} cannot be read: {error.strerror}", hint=self._build_hint) from error
        if engine is None:
            raise TargetError(
                f"{trt.__name__} {trt.__version__} does not load {prebuilt.name}: {first_error(logger.messages)}",
                hint=f"an engine fits one version of it and some GPUs; for this machine: {self._build_hint}",
            )
        context, after_first_run = self._context(trt, engine, path)
        if context is None:
            raise TargetError(
                f"{trt.__name__} cannot prepare {self.name}: {first_error(logger.messages)}",
                hint="is enough of the GPU's memory free?",
            )
        # A CUDA graph runs in the memory of the context it was captured from, so the graph has to go first.
        resources.callback(_forget, context, after_first_run)
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        specs = {name: self._spec(engine, name) for name in names}
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = {name: specs[name] for name in names if is_input[name]}
        self.outputs = {name: specs[name] for name in names if not is_input[name]}
        self._buffers = {name: self._buffer(specs[name], is_input[name], resources) for name in names}
        for name, buffer in self._buffers.items():
            if not context.set_tensor_address(name, buffer.device):
                raise TargetError(f"{self.name} does not take memory for {name!r}: {first_error(logger.messages)}")
        stream = call(cudart.cudaStreamCreate)
        resources.callback(_free, cudart.cudaStreamDestroy, stream)

        def enqueue() -> None:
            logger.messages.clear()
            for buffer in self._buffers.values():
                if buffer.is_input:
                    self._copy(buffer, stream)
            if not context.execute_async_v3(int(stream)):
                raise TargetError(f"{self.name} cannot be run: {first_error(logger.messages)}")
            for buffer in self._buffers.values():
                if not buffer.is_input:
                    self._copy(buffer, stream)

        def step() -> None:
            enqueue()
            call(cudart.cudaStreamSynchronize, stream)

        step()  # both libraries put off some of their preparations to the first run, and these cannot be captured
        after_first_run()
        return self._captured(enqueue, stream, resources) or step

    def _context(self, trt: Any, engine: Any, path: Path) -> tuple[Any, Callable[[], None]]:
        """An execution context, and what is to be called once it has run."""
        return engine.create_execution_context(), _forget

    def _spec(self, engine: Any, name: str) -> TensorSpec:
        shape, dtype = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name).name
        if any(size < 0 for size in shape):
            raise TargetError(f"{self.name} has a dynamic shape for {name!r}, and only static engines are run")
        if dtype not in _DTYPES:
            raise TargetError(f"{self.name} has {name!r} in {dtype}, which NumPy has not")
        return TensorSpec(name, shape, np.dtype(_DTYPES[dtype]))

    def _buffer(self, spec: TensorSpec, is_input: bool, resources: ExitStack) -> _Buffer:
        shape = tuple(size or 0 for size in spec.shape)
        count = math.prod(shape)
        size = max(count * spec.dtype.itemsize, 1)
        device = int(call(self._cudart.cudaMalloc, size))
        resources.callback(_free, self._cudart.cudaFree, device)
        address = int(call(self._cudart.cudaMallocHost, size))
        resources.callback(_free, self._cudart.cudaFreeHost, address)
        memory = memoryview((ctypes.c_byte * size).from_address(address)).cast("B")
        host: Array = np.frombuffer(memory, dtype=spec.dtype, count=count).reshape(shape)
        host.fill(0)
        return _Buffer(host, device, is_input)

    def _copy(self, buffer: _Buffer, stream: Any) -> None:
        kinds = self._cudart.cudaMemcpyKind
        host, device, size = buffer.host.ctypes.data, buffer.device, buffer.host.nbytes
        if buffer.is_input:
            call(self._cudart.cudaMemcpyAsync, device, host, size, kinds.cudaMemcpyHostToDevice, stream)
        else:
            call(self._cudart.cudaMemcpyAsync, host, device, size, kinds.cudaMemcpyDeviceToHost, stream)

    def _captured(self, enqueue: Callable[[], None], stream: Any, resources: ExitStack) -> Callable[[], None] | None:
        """``enqueue`` as one CUDA graph and a wait for its end; ``None`` if it cannot be captured."""
        cudart = self._cudart
        call(cudart.cudaStreamBeginCapture, stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            try:
                enqueue()
            finally:
                graph = call(cudart.cudaStreamEndCapture, stream)
            resources.callback(_free, cudart.cudaGraphDestroy, graph)
            launchable = call(cudart.cudaGraphInstantiate, graph, 0)
        except TargetError:
            return None
        resources.callback(_free, cudart.cudaGraphExecDestroy, launchable)
        self.captured = True

        def launch() -> None:
            call(cudart.cudaGraphLaunch, launchable, stream)
            call(cudart.cudaStreamSynchronize, stream)

        return launch


class TensorRTRTXEngine(TensorRTEngine):
    """An engine of TensorRT-RTX, which may have been built on another machine.

    ``captured`` says that TensorRT-RTX was asked to run the computation as a CUDA graph (1.2 and later can).
    """

    kind: ClassVar[Kind] = "tensorrt-rtx"

    def _context(self, trt: Any, engine: Any, path: Path) -> tuple[Any, Callable[[], None]]:
        config = engine.create_runtime_config()
        if hasattr(config, "cuda_graph_strategy"):
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.captured = True
        cache, file, before = config.create_runtime_cache(), self._cache_file(path), b""
        if file is not None and file.is_file():
            before = file.read_bytes()
            cache.deserialize(before)  # False, and nothing is read, for another GPU, driver or version
        config.set_runtime_cache(cache)

        # The context's owner keeps this function and with it the cache: the config does not, and a cache that is gone
        # while its context runs ends the process (seen by others with TensorRT-RTX 1.6).
        def keep() -> None:
            compiled = bytes(cache.serialize())
            # A bundle that cannot be written is run all the same; its kernels are then compiled each time.
            with contextlib.suppress(OSError):
                if file is not None and compiled != before:
                    file.parent.mkdir(exist_ok=True)
                    with atomic_file(file) as temporary:
                        temporary.write_bytes(compiled)

        return engine.create_execution_context(config), keep

    def _captured(self, enqueue: Callable[[], None], stream: Any, resources: ExitStack) -> Callable[[], None] | None:
        return None

    def _cache_file(self, graph: Path) -> Path | None:
        """Where compiled kernels are kept; a link is not followed, as it may lead out of the bundle."""
        if self._cache is None or self._cache.is_symlink():
            return None
        file = self._cache / f"{graph.parent.name}.{graph.stem}.rtxcache"
        return None if file.is_symlink() else file


def _free(function: Any, handle: Any) -> None:
    """Undo an allocation; one that fails says nothing new, as the run before it failed too."""
    with contextlib.suppress(TargetError):
        call(function, handle)


def _forget(*objects: Any) -> None:
    """Hold ``objects`` until this is called."""
