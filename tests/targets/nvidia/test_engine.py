"""TensorRT engines: the real libraries' errors without a GPU; what is asked of CUDA, which a stand-in answers; and on a
GPU the real thing.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mtu_compile.core.errors import ConfigError, TargetError, ToolchainMissing
from mtu_compile.runtime.engine import Engine, open_engine
from targets.nvidia import cuda
from targets.nvidia import engine as tensorrt_engine
from targets.nvidia.builder import Recipe, build_engine
from targets.nvidia.cuda import Device, device_info, load_cudart
from targets.nvidia.engine import TensorRTEngine, TensorRTRTXEngine
from targets.nvidia.library import load_tensorrt

SHAPE = (2, 3)
X = np.arange(6, dtype=np.float32).reshape(SHAPE)
ADA = Device("NVIDIA GeForce RTX 4090", "8.9", 24 << 30, 20 << 30, "13.0")


class Code(IntEnum):
    ok = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureInvalidated = 901


class Cuda(SimpleNamespace):
    """A CUDA runtime whose GPU is this process: memory is ctypes buffers, streams and graphs are lists of calls."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, *, capturable: bool = True) -> None:
        self.capturable = capturable
        self.alive: dict[Any, Any] = {}
        self.log: list[str] = []
        self.recording: list[Callable[[], None]] | None = None
        self.allocations_left = 99

    def do(self, name: str, work: Callable[[], None]) -> None:
        """Work on the stream: now, or at a graph's launch."""
        if self.recording is None:
            self.log.append(name)
            work()
        else:
            self.recording.append(work)

    def _new(self, thing: Any) -> int:
        handle = ctypes.addressof(thing) if isinstance(thing, ctypes.Array) else 1000 + len(self.alive)
        self.alive[handle] = thing
        return handle

    def _end(self, handle: int) -> tuple[Code]:
        del self.alive[handle]
        return (Code.ok,)

    def cudaMalloc(self, size: int) -> tuple[Code, int | None]:
        self.allocations_left -= 1
        if self.allocations_left < 0:
            return Code.cudaErrorMemoryAllocation, None
        return Code.ok, self._new((ctypes.c_byte * size)())

    cudaMallocHost = cudaMalloc
    cudaFree = cudaFreeHost = cudaStreamDestroy = cudaGraphDestroy = cudaGraphExecDestroy = _end

    def cudaStreamCreate(self) -> tuple[Code, int]:
        return Code.ok, self._new("stream")

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[Code]:
        self.do("in" if kind == 1 else "out", lambda: ctypes.memmove(to, source, size) and None)
        return (Code.ok,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Code]:
        self.log.append("wait")
        return (Code.ok,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Code]:
        self.recording = []
        return (Code.ok,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Code, int | None]:
        graph, self.recording = self.recording, None
        if not self.capturable:
            return Code.cudaErrorStreamCaptureInvalidated, None
        return Code.ok, self._new(graph)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Code, int]:
        return Code.ok, self._new(self.alive[graph])

    def cudaGraphLaunch(self, launchable: int, stream: int) -> tuple[Code]:
        self.log.append("launch")
        for work in self.alive[launchable]:
            work()
        return (Code.ok,)


class Context:
    """Computes y = 2 x + 1."""

    def __init__(self, gpu: Cuda) -> None:
        self.gpu = gpu
        self.at: dict[str, int] = {}
        self.samples = SHAPE[0]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.samples = shape[0]
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.at[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        def compute() -> None:
            flat = (np.frombuffer(self.gpu.alive[self.at[name]], np.float32) for name in "xy")
            x, y = (array.reshape(-1, SHAPE[1])[: self.samples] for array in flat)
            y[...] = 2 * x + 1

        self.gpu.do("compute", compute)
        return True


class Library(ModuleType):
    """A TensorRT with one engine of ``x`` and ``y``, both of ``dtype`` and ``shape``."""

    __version__ = "10.3.0"
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

    class ILogger:
        ERROR, INTERNAL_ERROR, WARNING = "E", "I", "W"

    def __init__(self, gpu: Cuda, shape: tuple[int, ...] = SHAPE, dtype: str = "FLOAT") -> None:
        super().__init__("tensorrt")
        self.gpu, self.shape, self.dtype = gpu, shape, dtype
        self.kernels = b""
        self.config: Any = None
        self.Runtime = self._runtime

    def _runtime(self, logger: Any) -> Any:
        def deserialize(blob: bytes) -> Any:
            if blob != b"engine":
                logger.log("E", "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (wrong version)")
                return None
            return SimpleNamespace(
                create_execution_context=self._context,
                create_runtime_config=self._runtime_config,
                num_io_tensors=2,
                get_tensor_name=lambda index: "xy"[index],
                get_tensor_mode=lambda name: "input" if name == "x" else "output",
                get_tensor_shape=lambda name: self.shape,
                get_tensor_profile_shape=lambda name, profile: ((1, 3), (2, 3), (3, 3)),
                get_tensor_dtype=lambda name: SimpleNamespace(name=self.dtype),
            )

        return SimpleNamespace(deserialize_cuda_engine=deserialize)

    def _context(self, config: Any = None) -> Context:
        self.config = config
        return Context(self.gpu)

    def _runtime_config(self) -> Any:
        def read(blob: bytes) -> bool:
            self.kernels = blob
            return True

        cache = SimpleNamespace(serialize=lambda: self.kernels + b"+jit", deserialize=read)
        return SimpleNamespace(
            cuda_graph_strategy="off", create_runtime_cache=lambda: cache, set_runtime_cache=lambda cache: True
        )


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "unet_t2i").mkdir()
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "unet_t2i" / "model.engine").write_bytes(b"engine")
    return tmp_path


def stand_in(monkeypatch: pytest.MonkeyPatch, gpu: Cuda, library: Library, device: Device = ADA) -> None:
    monkeypatch.setattr(tensorrt_engine, "load_tensorrt", lambda kind: library)
    monkeypatch.setattr(tensorrt_engine, "load_cudart", lambda: gpu)
    monkeypatch.setattr(tensorrt_engine, "device_info", lambda: device)


def open_in(bundle: Path, kind: str = "tensorrt", **config: str) -> Engine:
    return open_engine(
        kind, bundle / "unet_t2i" / "model.onnx", config, bundle / "unet_t2i" / "model.engine", cache=bundle / "built"
    )


def test_a_step_is_one_launch_and_everything_is_given_back(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = Cuda()
    stand_in(monkeypatch, gpu, Library(gpu))
    engine = open_in(bundle)
    assert isinstance(engine, TensorRTEngine) and engine.captured
    assert {name: str(spec) for name, spec in {**engine.inputs, **engine.outputs}.items()} == {
        "x": "float32 [2, 3]",
        "y": "float32 [2, 3]",
    }
    assert gpu.log == ["in", "compute", "out", "wait"]  # once before it is captured
    gpu.log.clear()
    first = engine({"x": X})["y"]
    np.testing.assert_array_equal(first, 2 * X + 1)
    np.testing.assert_array_equal(engine({"x": X.T.copy().T + 5})["y"], 2 * (X + 5) + 1)
    np.testing.assert_array_equal(first, 2 * X + 1)  # results belong to the caller
    assert gpu.log == ["launch", "wait"] * 2
    engine.close()
    engine.close()
    assert gpu.alive == {}
    with pytest.raises(TargetError, match="closed"):
        engine({"x": X})


def test_an_engine_with_a_profile_runs_batches_of_any_size_up_to_its_largest(
    monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    gpu = Cuda()
    stand_in(monkeypatch, gpu, Library(gpu, (-1, 3)))
    engine = open_in(bundle)
    assert engine.inputs["x"].shape == (None, 3) and engine.inputs["x"].most == engine.outputs["y"].most == 3
    for samples in (2, 1, 3, 1):
        gpu.log.clear()
        x = np.arange(3 * samples, dtype=np.float32).reshape(samples, 3) + samples
        np.testing.assert_array_equal(engine({"x": x})["y"], 2 * x + 1)
        assert gpu.log[-2:] == ["launch", "wait"]
    assert gpu.log == ["launch", "wait"]  # a batch that was run before is prepared
    with pytest.raises(TargetError, match="'x'"):
        engine({"x": np.zeros((4, 3), np.float32)})
    engine.close()
    assert gpu.alive == {}


def test_a_network_that_cannot_be_captured_runs_all_the_same(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = Cuda(capturable=False)
    stand_in(monkeypatch, gpu, Library(gpu))
    engine = open_in(bundle)
    assert isinstance(engine, TensorRTEngine) and not engine.captured
    gpu.log.clear()
    np.testing.assert_array_equal(engine({"x": X})["y"], 2 * X + 1)
    assert gpu.log == ["in", "compute", "out", "wait"]
    engine.close()
    assert gpu.alive == {}


def test_tensorrt_rtx_captures_by_itself_and_its_kernels_are_kept(
    monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    gpu = Cuda()
    library = Library(gpu)
    stand_in(monkeypatch, gpu, library)
    cache = bundle / "built" / "unet_t2i.model.rtxcache"
    engine = open_in(bundle, "tensorrt-rtx", compute_capabilities="8.6,8.9")
    assert isinstance(engine, TensorRTRTXEngine) and engine.captured
    assert library.config.cuda_graph_strategy == "whole"
    gpu.log.clear()
    np.testing.assert_array_equal(engine({"x": X})["y"], 2 * X + 1)
    assert gpu.log == ["in", "compute", "out", "wait"]
    engine.close()
    assert gpu.alive == {} and cache.read_bytes() == b"+jit"
    open_in(bundle, "tensorrt-rtx").close()
    assert cache.read_bytes() == b"+jit+jit"  # read before, written after
    assert {path.name for path in (bundle / "unet_t2i").iterdir()} == {"model.engine"}


def test_kernels_are_not_written_through_a_link(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    gpu = Cuda()
    stand_in(monkeypatch, gpu, Library(gpu))
    (bundle / "built").symlink_to(elsewhere)
    open_in(bundle, "tensorrt-rtx").close()
    assert list(elsewhere.iterdir()) == []


def test_inputs_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = Cuda()
    stand_in(monkeypatch, gpu, Library(gpu))
    engine = open_in(bundle)
    with pytest.raises(TargetError, match=r"takes 'x' as float32 \[2, 3\], and was given float64"):
        engine({"x": X.astype(np.float64)})


@pytest.mark.parametrize("allocations", range(4))
def test_memory_that_runs_out_is_named_and_given_back(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, allocations: int
) -> None:
    gpu = Cuda()
    gpu.allocations_left = allocations
    stand_in(monkeypatch, gpu, Library(gpu))
    with pytest.raises(TargetError, match="cudaErrorMemoryAllocation"):
        open_in(bundle)
    assert gpu.alive == {}


def test_an_engine_of_another_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = Cuda()
    stand_in(monkeypatch, gpu, Library(gpu))
    with pytest.raises(TargetError, match=r"is for GPUs of compute capability 8\.7, and NVIDIA GeForce .* has 8\.9"):
        open_in(bundle, compute_capabilities="8.7")


def test_an_engine_of_another_version_is_refused_with_the_command_that_builds_one(
    monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    gpu = Cuda()
    stand_in(monkeypatch, gpu, Library(gpu))
    (bundle / "unet_t2i" / "model.engine").write_bytes(b"of another version")
    with pytest.raises(TargetError, match=r"tensorrt 10\.3\.0 does not load model\.engine: wrong version") as caught:
        open_in(bundle)
    assert f"mtu-compile board build {bundle}" in str(caught.value.hint)
    (bundle / "unet_t2i" / "model.engine").unlink()
    with pytest.raises(TargetError, match="cannot be read"):
        open_in(bundle)
    with pytest.raises(TargetError, match=r"no engine was built for unet_t2i/model\.onnx") as caught:
        open_engine("tensorrt", bundle / "unet_t2i" / "model.onnx", {})
    assert str(caught.value.hint) == f"mtu-compile board build {bundle}"


def test_borders_that_cannot_be_run_are_refused(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    gpu = Cuda()
    stand_in(monkeypatch, gpu, Library(gpu, dtype="BF16"))
    with pytest.raises(TargetError, match="'x' in BF16"):
        open_in(bundle)
    stand_in(monkeypatch, gpu, Library(gpu, shape=(-1, -1)))
    with pytest.raises(TargetError, match="dynamic shape for 'x'"):
        open_in(bundle)
    with pytest.raises(ConfigError, match="no option 'device'"):
        open_in(bundle, device="GPU")


NO_GPU = """
import json, sys
from pathlib import Path
from mtu_compile.core.errors import MtuError
from targets.nvidia.cuda import device_info
from mtu_compile.runtime.engine import open_engine

found = []
for attempt in (device_info, lambda: open_engine("tensorrt-rtx", Path("m.onnx"), {}, Path("m.engine"))):
    try:
        attempt()
    except MtuError as error:
        found.append([type(error).__name__, error.message, error.hint])
print(json.dumps(found))
"""


def test_the_real_libraries_without_a_gpu() -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'mtu-compile[rtx]'", exc_type=ImportError)
    # On a machine with a GPU it is hidden; CUDA then says that there is none, as without a driver.
    command, environment = [sys.executable, "-c", NO_GPU], {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 2
    for kind, message, hint in errors:
        assert kind == "TargetError"
        assert message.startswith("no NVIDIA ")
        assert "nvidia-smi" in hint


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)


def test_missing_libraries_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        hide(patch, "tensorrt", "tensorrt_rtx")
        for kind, extra in (("tensorrt", "[tensorrt]"), ("tensorrt-rtx", "[rtx]")):
            with pytest.raises(ToolchainMissing) as caught:
                open_engine(kind, tmp_path / "m.onnx", {}, tmp_path / "m.engine")
            assert extra in str(caught.value.hint)
    hide(monkeypatch, "cuda.bindings.runtime", "cuda.cudart")
    for attempt in (device_info, lambda: open_engine("tensorrt-rtx", tmp_path / "m.onnx", {}, tmp_path / "m.engine")):
        with pytest.raises(ToolchainMissing, match="cuda-python") as caught:
            attempt()
        assert caught.value.hint == "pip install cuda-python"


def test_cuda_python_is_found_in_its_older_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_cudart().__name__ == "cuda.bindings.runtime"
    older = ModuleType("cuda.cudart")
    hide(monkeypatch, "cuda.bindings.runtime")
    monkeypatch.setitem(sys.modules, "cuda.cudart", older)
    assert load_cudart() is older


def cudart(driver: int = 13000, count: int = 1, name: Any = b"Orin\0") -> SimpleNamespace:
    attributes = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=8, cudaDevAttrComputeCapabilityMinor=7)
    return SimpleNamespace(
        cudaDeviceAttr=attributes,
        cudaDriverGetVersion=lambda: (Code.ok, driver),
        cudaGetDeviceCount=lambda: (Code.ok, count),
        cudaSetDevice=lambda index: (Code.ok,),
        cudaDeviceGetAttribute=lambda attribute, index: (Code.ok, attribute),
        cudaGetDeviceProperties=lambda index: (Code.ok, SimpleNamespace(name=name)),
        cudaMemGetInfo=lambda: (Code.ok, 3 << 30, 8 << 30),
    )


def test_what_is_said_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "load_cudart", lambda: cudart(driver=12060))
    assert device_info() == Device("Orin", "8.7", 8 << 30, 3 << 30, "12.6")
    for module, words in ((cudart(driver=0), "no NVIDIA driver"), (cudart(count=0), "no NVIDIA GPU on this machine")):
        monkeypatch.setattr(cuda, "load_cudart", lambda module=module: module)
        with pytest.raises(TargetError, match=words):
            device_info()


def test_a_driver_that_cuda_python_cannot_find_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")  # cuda-python 12.6; later ones return an error

    broken = cudart()
    broken.cudaDriverGetVersion = missing
    monkeypatch.setattr(cuda, "load_cudart", lambda: broken)
    with pytest.raises(TargetError, match="no NVIDIA driver"):
        device_info()


def write_model(path: Path) -> Path:
    """y = conv(x) with weights of a fixed seed; x and y f32 [1, 4, 8, 8]."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).standard_normal((4, 4, 3, 3), dtype=np.float32)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 8, 8]) for name in "xy"]
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv", pads=[1, 1, 1, 1])]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tensorrt-rtx", "tensorrt"])
def test_an_engine_built_here_computes_the_graph_on_the_gpu(kind: str, tmp_path: Path) -> None:
    """Proves that an engine loads, that a step is one CUDA graph, and that it agrees with ONNX Runtime; each case needs
    its own library.
    """
    try:
        load_tensorrt(kind)
    except ToolchainMissing as error:
        pytest.skip(f"{error.message}; run: {error.hint}")
    graph = write_model(tmp_path / "model.onnx")
    build_engine(graph, tmp_path / "model.engine", Recipe(), kind=kind)
    engine = open_engine(kind, graph, {}, tmp_path / "model.engine")
    reference = open_engine("onnxruntime", graph, {})
    assert getattr(engine, "captured", False)
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((1, 4, 8, 8), dtype=np.float32)
        np.testing.assert_allclose(engine({"x": x})["y"], reference({"x": x})["y"], rtol=1e-4, atol=1e-4)
    engine.close()


@pytest.mark.gpu
def test_the_gpu_says_what_it_is() -> None:
    """Proves that cuda-python's answers are read as they are meant."""
    device = device_info()
    assert device.name and 0 < device.free_bytes <= device.total_bytes
    assert float(device.compute_capability) >= 7.5 and float(device.driver) >= 12
