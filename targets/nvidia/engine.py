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
        host: page-locked, of the tensor's shape and dtype; of the largest batch, where any goes.
        device: address on the GPU.
        is_input: copied to the GPU before the computation, and not from it after.
        free: its batch is not fixed.
    """

    host: Array
    device: int
    is_input: bool
    free: bool

    def of(self, samples: int | None) -> Array:
        """What a run of ``samples`` uses of it."""
        return self.host[:samples] if self.free else self.host


class TensorRTEngine(EngineBase):
    """An engine of TensorRT itself, built on this machine; see ``open_engine`` for the arguments and what is raised.

    An engine with a profile runs any batch up to the profile's largest. A batch that is run for the first time gets an
    execution context and a CUDA graph of its own (changing a context's shapes would spoil the graph captured from it),
    and with them memory for activations; the weights are there once.

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
        found = device_info()
        self.device = f"{found.name}, compute capability {found.compute_capability}"
        self._require(found, recipe)
        if prebuilt is None:
            raise TargetError(f"no engine was built for {self.name}", hint=self._build_hint)
        with ExitStack() as resources:
            self._open(trt, path, prebuilt, resources)
            self._resources = resources.pop_all()

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        samples = self._samples(inputs)
        if samples not in self._steps:
            with ExitStack() as resources:
                self._steps[samples] = self._prepare(samples, resources)
                self._resources.push(resources.pop_all())
        for name in self.inputs:
            np.copyto(self._buffers[name].of(samples), inputs[name])
        self._steps[samples]()
        return {name: self._buffers[name].of(samples).copy() for name in self.outputs}

    def _samples(self, inputs: Mapping[str, Array]) -> int | None:
        """The batch of a call, where it is free."""
        counts = {len(inputs[name]) for name in self.inputs if self._buffers[name].free}
        if len(counts) > 1:
            raise TargetError(f"{self.name} was given inputs of {' and '.join(map(str, sorted(counts)))} samples")
        return counts.pop() if counts else None

    def _free(self) -> None:
        self._steps.clear()
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

    def _open(self, trt: Any, path: Path, prebuilt: Path, resources: ExitStack) -> None:
        """Do everything that is done once; what has to be undone goes on ``resources``."""
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
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        free = [name for name in names if is_input[name] and shapes[name][:1] == (-1,)]
        profiles = [engine.get_tensor_profile_shape(name, 0) for name in free]
        most = min((int(largest[0]) for _, _, largest in profiles), default=None)
        specs = {name: self._spec(engine, name, shapes[name], most) for name in names}
        self.inputs = {name: specs[name] for name in names if is_input[name]}
        self.outputs = {name: specs[name] for name in names if not is_input[name]}
        self._buffers = {name: self._buffer(specs[name], is_input[name], resources) for name in names}
        self._stream = call(self._cudart.cudaStreamCreate)
        resources.callback(_free, self._cudart.cudaStreamDestroy, self._stream)
        self._opened = (trt, engine, path, logger)
        resources.callback(self._forget_engine)
        usual = min((int(shape[0]) for _, shape, _ in profiles), default=None)
        self._steps = {usual: self._prepare(usual, resources)}

    def _forget_engine(self) -> None:
        del self._opened

    def _prepare(self, samples: int | None, resources: ExitStack) -> Callable[[], None]:
        """A step of ``samples`` (``None``: of a static engine); what has to be undone goes on ``resources``."""
        trt, engine, path, logger = self._opened
        cudart, stream = self._cudart, self._stream
        context, after_first_run = self._context(trt, engine, path)
        if context is None:
            raise TargetError(
                f"{trt.__name__} cannot prepare {self.name}: {first_error(logger.messages)}",
                hint="is enough of the GPU's memory free?",
            )
        # A CUDA graph runs in the memory of the context it was captured from, so the graph has to go first.
        resources.callback(_forget, context, after_first_run)
        for name, buffer in self._buffers.items():
            if buffer.free and buffer.is_input and not context.set_input_shape(name, buffer.of(samples).shape):
                raise TargetError(f"{self.name} does not take {samples} samples: {first_error(logger.messages)}")
            if not context.set_tensor_address(name, buffer.device):
                raise TargetError(f"{self.name} does not take memory for {name!r}: {first_error(logger.messages)}")

        def enqueue() -> None:
            logger.messages.clear()
            for buffer in self._buffers.values():
                if buffer.is_input:
                    self._copy(buffer, samples, stream)
            if not context.execute_async_v3(int(stream)):
                raise TargetError(f"{self.name} cannot be run: {first_error(logger.messages)}")
            for buffer in self._buffers.values():
                if not buffer.is_input:
                    self._copy(buffer, samples, stream)

        def step() -> None:
            enqueue()
            call(cudart.cudaStreamSynchronize, stream)

        step()  # both libraries put off some of their preparations to the first run, and these cannot be captured
        after_first_run()
        return self._captured(enqueue, stream, resources) or step

    def _context(self, trt: Any, engine: Any, path: Path) -> tuple[Any, Callable[[], None]]:
        """An execution context, and what is to be called once it has run."""
        return engine.create_execution_context(), _forget

    def _spec(self, engine: Any, name: str, shape: tuple[int, ...], most: int | None) -> TensorSpec:
        dtype = engine.get_tensor_dtype(name).name
        free = shape[:1] == (-1,) and most is not None
        if any(size < 0 for size in shape[free:]):
            raise TargetError(f"{self.name} has a dynamic shape for {name!r}, and only a batch may be free")
        if dtype not in _DTYPES:
            raise TargetError(f"{self.name} has {name!r} in {dtype}, which NumPy has not")
        sizes = (None, *shape[1:]) if free else shape
        return TensorSpec(name, sizes, np.dtype(_DTYPES[dtype]), most if free else None)

    def _buffer(self, spec: TensorSpec, is_input: bool, resources: ExitStack) -> _Buffer:
        shape = tuple(spec.most or 0 if size is None else size for size in spec.shape)
        count = math.prod(shape)
        size = max(count * spec.dtype.itemsize, 1)
        device = int(call(self._cudart.cudaMalloc, size))
        resources.callback(_free, self._cudart.cudaFree, device)
        address = int(call(self._cudart.cudaMallocHost, size))
        resources.callback(_free, self._cudart.cudaFreeHost, address)
        memory = memoryview((ctypes.c_byte * size).from_address(address)).cast("B")
        host: Array = np.frombuffer(memory, dtype=spec.dtype, count=count).reshape(shape)
        host.fill(0)
        return _Buffer(host, device, is_input, spec.most is not None)

    def _copy(self, buffer: _Buffer, samples: int | None, stream: Any) -> None:
        kinds = self._cudart.cudaMemcpyKind
        host, device, size = buffer.host.ctypes.data, buffer.device, buffer.of(samples).nbytes
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
