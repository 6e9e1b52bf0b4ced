"""Engines really built with TensorRT-RTX, without a GPU; nothing here runs one."""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mtu_compile.core.errors import EXIT_TOOLCHAIN, BuildError, ConfigError, ModelError, ToolchainMissing
from targets.nvidia import builder as tensorrt_builder
from targets.nvidia import engine as tensorrt_engine
from targets.nvidia import library as tensorrt_library
from targets.nvidia.builder import Recipe, build_engine, check_graph, load_tensorrt, version

ADA = Recipe(compute_capabilities=("8.9",))
F32, F16 = TensorProto.FLOAT, TensorProto.FLOAT16
node = helper.make_node


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any] | None = None,
    shape: tuple[int | str, ...] = (1, 4, 8, 8),
    *,
    external: bool = False,
) -> Path:
    """A graph from ``x`` to ``y``, both float32 of ``shape``."""
    info = [helper.make_tensor_value_info(name, F32, shape) for name in "xy"]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], initializers)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"save_as_external_data": True, "location": f"{path.name}.data", "size_threshold": 64}
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path), **(options if external else {}))
    return path


def write_quantised(path: Path, *, external: bool = False) -> Path:
    """A convolution of int8 weights and activations between fp16 values, float32 outside: what a task's UNet is."""
    rng = np.random.default_rng(0)
    constants = {
        "s_x": np.float16(0.05),
        "zero": np.int8(0),
        "w": rng.integers(-127, 128, (4, 4, 3, 3), dtype=np.int8),
        "s_w": np.full(4, 0.01, np.float16),
        "zeros": np.zeros(4, np.int8),
        "b": np.ones(4, np.float16),
    }
    nodes = [
        node("Cast", ["x"], ["h"], name="in", to=F16),
        node("QuantizeLinear", ["h", "s_x", "zero"], ["q"], name="quantise"),
        node("DequantizeLinear", ["q", "s_x", "zero"], ["d"], name="dequantise"),
        node("DequantizeLinear", ["w", "s_w", "zeros"], ["dw"], name="weights", axis=0),
        node("Conv", ["d", "dw", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        node("Cast", ["c"], ["y"], name="out", to=F32),
    ]
    return write(path, nodes, constants, external=external)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantised(tmp_path_factory.mktemp("graphs") / "model.onnx")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_quantised_fp16_graph_is_built_and_nothing_is_printed(
    quantised: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.engine"
    built = build_engine(quantised, out, ADA, kind="tensorrt-rtx")
    assert built.path == out and built.bytes == out.stat().st_size > 1000
    assert built.toolchain == f"tensorrt_rtx {version('tensorrt-rtx')}"
    assert built.seconds > 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.engine"]
    assert capfd.readouterr() == ("", "")


def test_building_again_gives_the_same_bytes(quantised: Path, tmp_path: Path) -> None:
    hashes = set()
    for name in ("a", "b"):
        build_engine(quantised, tmp_path / name, ADA, kind="tensorrt-rtx")
        hashes.add(digest(tmp_path / name))
    build_engine(quantised, tmp_path / "a", ADA, kind="tensorrt-rtx")  # one that exists is replaced
    assert {*hashes, digest(tmp_path / "a")} == hashes and len(hashes) == 1


def test_engines_are_for_the_gpus_that_were_asked_for(quantised: Path, tmp_path: Path) -> None:
    hashes = set()
    for capabilities in ((), ("8.6",), ("8.9",), ("12.0",), ("8.6", "8.9")):
        build_engine(quantised, tmp_path / "e", Recipe(compute_capabilities=capabilities), kind="tensorrt-rtx")
        hashes.add(digest(tmp_path / "e"))
    assert len(hashes) == 5


def test_fp8_is_built_for_gpus_that_have_it(tmp_path: Path) -> None:
    import ml_dtypes

    def fp8(name: str, values: np.ndarray) -> onnx.TensorProto:
        raw = values.astype(ml_dtypes.float8_e4m3fn).tobytes()
        return helper.make_tensor(name, TensorProto.FLOAT8E4M3FN, values.shape, raw, raw=True)

    nodes = [
        node("Cast", ["x"], ["h"], name="in", to=F16),
        node("QuantizeLinear", ["h", "s", "z"], ["q"], name="quantise"),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantise"),
        node("DequantizeLinear", ["w", "s", "z"], ["dw"], name="weights"),
        node("MatMul", ["d", "dw"], ["m"], name="product"),
        node("Cast", ["m"], ["y"], name="out", to=F32),
    ]
    info = [helper.make_tensor_value_info(name, F32, [1, 8, 64]) for name in "xy"]
    weights = fp8("w", np.random.default_rng(0).standard_normal((64, 64)))
    constants = [weights, fp8("z", np.zeros(())), numpy_helper.from_array(np.float16(0.05), "s")]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    for capability in ("8.9", "12.0"):
        recipe = Recipe(compute_capabilities=(capability,))
        assert build_engine(tmp_path / "m.onnx", tmp_path / "e", recipe, kind="tensorrt-rtx").bytes > 0
    with pytest.raises(BuildError, match="fp8"):
        build_engine(tmp_path / "m.onnx", tmp_path / "f", Recipe(compute_capabilities=("8.6",)), kind="tensorrt-rtx")


@pytest.mark.parametrize("capability", ["8.7", "9.0", "11.0"])
def test_a_gpu_the_library_does_not_build_for_is_refused(quantised: Path, tmp_path: Path, capability: str) -> None:
    with pytest.raises(BuildError, match=rf"does not build for compute capability {capability}") as caught:
        build_engine(quantised, tmp_path / "e", Recipe(compute_capabilities=("8.9", capability)), kind="tensorrt-rtx")
    assert "8.6, 8.9, 12.0" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_weights_beside_the_graph_are_found_and_missed(tmp_path: Path) -> None:
    inside = write_quantised(tmp_path / "inside" / "model.onnx")
    beside = write_quantised(tmp_path / "beside" / "model.onnx", external=True)
    data = beside.with_name("model.onnx.data")
    assert data.is_file()
    for graph in (inside, beside):
        build_engine(graph, graph.with_suffix(".engine"), ADA, kind="tensorrt-rtx")
    assert digest(inside.with_suffix(".engine")) == digest(beside.with_suffix(".engine"))
    data.unlink()
    with pytest.raises(BuildError, match="Failed to import initializer: w"):
        check_graph(beside, "tensorrt-rtx")


REFUSED = {
    "an unknown operation": (
        [node("Mystery", ["x"], ["y"], name="my.node", domain="nowhere")],
        {},
        "node 'my.node' (M",
    ),
    "one without a name": ([node("Mystery", ["x"], ["y"], domain="nowhere")], {}, "node number 0 (Mystery): this op"),
    "an operation it leaves out": ([node("Det", ["x"], ["y"], name="det")], {}, "node 'det' (Det): this operation is"),
    "a zero point": (
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quant"),
            node("DequantizeLinear", ["q", "s", "z"], ["y"], name="deq"),
        ],
        {"s": np.float32(0.1), "z": np.int8(3)},
        "node 'quant' (QuantizeLinear)",
    ),
    "unsigned activations": (
        [
            node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quant"),
            node("DequantizeLinear", ["q", "s", "z"], ["y"], name="deq"),
        ],
        {"s": np.float32(0.1), "z": np.uint8(0)},
        "node quant [QuantizeLinear]: TensorRT supports",
    ),
    "an int32 bias": (
        [
            node("DequantizeLinear", ["b", "s"], ["f"], name="deq.bias"),
            node("Conv", ["x", "w", "f"], ["y"], name="conv"),
        ],
        {"s": np.float32(0.1), "b": np.ones(4, np.int32), "w": np.ones((4, 4, 1, 1), np.float32)},
        "node 'deq.bias' (DequantizeLinear): deq.bias: input has type Int32",
    ),
    "two types": (
        [node("Cast", ["x"], ["h"], name="cast", to=F16), node("Add", ["h", "x"], ["y"], name="mix.add")],
        {},
        "node 'mix.add' (Add): mix.add: ElementWiseOperation SUM must have same input types",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_parser_refuses_is_an_error_that_names_the_node(tmp_path: Path, what: str) -> None:
    nodes, constants, words = REFUSED[what]
    graph = write(tmp_path / "model.onnx", nodes, constants)
    for attempt in (
        lambda: check_graph(graph, "tensorrt-rtx"),
        lambda: build_engine(graph, tmp_path / "e", ADA, kind="tensorrt-rtx"),
    ):
        with pytest.raises(BuildError, match=r"does not take model\.onnx") as caught:
            attempt()
        assert words in caught.value.message
        assert "\n" not in caught.value.message and ".cpp" not in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_every_refused_node_is_named(tmp_path: Path) -> None:
    nodes = [
        node("Mystery", ["x"], ["a"], name="first", domain="nowhere"),
        node("Relu", ["a"], ["b"], name="fine"),
        node("Puzzle", ["b"], ["y"], name="second", domain="nowhere"),
    ]
    with pytest.raises(BuildError, match=r"'first'.*'second'") as caught:
        check_graph(write(tmp_path / "model.onnx", nodes), "tensorrt-rtx")
    assert "fine" not in caught.value.message


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x00not a graph\xff" * 10)
    with pytest.raises(ModelError, match="holds no graph"):
        check_graph(tmp_path / "bad.onnx", "tensorrt-rtx")
    with pytest.raises(ModelError, match="does not exist"):
        build_engine(tmp_path / "none.onnx", tmp_path / "e", ADA, kind="tensorrt-rtx")


def test_shapes_that_vary_need_a_profile_that_fits(tmp_path: Path) -> None:
    graph = write(tmp_path / "model.onnx", [node("Relu", ["x"], ["y"], name="relu")], shape=("n", 4, 8, 8))

    def build(*shapes: tuple[int, ...], name: str = "x") -> None:
        profiles = {name: shapes} if shapes else {}
        build_engine(graph, tmp_path / "e", Recipe(profiles=profiles), kind="tensorrt-rtx")  # type: ignore[arg-type]

    build((1, 4, 8, 8), (2, 4, 8, 8), (3, 4, 8, 8))
    assert (tmp_path / "e").is_file()
    with pytest.raises(ConfigError, match="input 'x' has a dynamic shape"):
        build()
    with pytest.raises(ConfigError, match="profile for 'z', which is no input"):
        write(graph, [node("Relu", ["x"], ["y"], name="relu")])
        build((1, 4, 8, 8), (2, 4, 8, 8), (3, 4, 8, 8), name="z")
    write(graph, [node("Relu", ["x"], ["y"], name="relu")], shape=("n", 4, 8, 8))
    with pytest.raises(ConfigError, match="contradict"):
        build((3, 4, 8, 8), (2, 4, 8, 8), (1, 4, 8, 8))
    with pytest.raises(BuildError, match=r"cannot build.*axis 2"):
        build((1, 4, 9, 9), (2, 4, 9, 9), (3, 4, 9, 9))


def test_a_workspace_that_is_too_small_is_an_error_that_says_so(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"], name="product")]
    graph = write(tmp_path / "m.onnx", nodes, {"w": np.ones((512, 512), np.float32)}, shape=(64, 512, 512))
    build_engine(graph, tmp_path / "e", ADA, kind="tensorrt-rtx")
    with pytest.raises(BuildError, match="workspace") as caught:
        build_engine(
            graph, tmp_path / "f", Recipe(workspace_bytes=1024, compute_capabilities=("8.9",)), kind="tensorrt-rtx"
        )
    assert "workspace" in str(caught.value.hint)
    assert not (tmp_path / "f").exists()


def test_a_timing_cache_is_kept_and_a_stale_one_does_no_harm(quantised: Path, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "timing.cache"
    for before in (None, b"", b"of another version" * 9):
        if before is not None:
            cache.write_bytes(before)
        build_engine(quantised, tmp_path / "e", ADA, kind="tensorrt-rtx", timing_cache=cache)
        assert cache.read_bytes()[:4] == b"ptrt"
    (tmp_path / "file").write_bytes(b"")
    build_engine(quantised, tmp_path / "e", ADA, kind="tensorrt-rtx", timing_cache=tmp_path / "file" / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "e", "file"]


def test_progress_is_told_and_what_it_raises_ends_the_build(quantised: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    build_engine(quantised, tmp_path / "e", ADA, kind="tensorrt-rtx", advance=steps.append)
    assert len(steps) > 10 and set(steps) == {1}

    def fail(units: int) -> None:
        raise ValueError("the watcher broke")

    with pytest.raises(ValueError, match="the watcher broke"):
        build_engine(quantised, tmp_path / "f", ADA, kind="tensorrt-rtx", advance=fail)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


INTERRUPTED = """
import json, os, signal, sys, time
from pathlib import Path
from targets.nvidia.builder import Recipe, build_engine

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests with Ctrl-C ignored
graph, folder = Path(sys.argv[1]), Path(sys.argv[2])
(folder / "e").write_bytes(b"the one before")
steps = 0

def advance(units):
    global steps
    steps += 1
    if steps == 12:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

try:
    build_engine(graph, folder / "e", Recipe(), kind="tensorrt-rtx", timing_cache=folder / "cache", advance=advance)
except KeyboardInterrupt:
    left = {path.name: path.read_bytes()[:14].decode("latin1") for path in folder.iterdir()}
    print(json.dumps({"steps": steps, "left": left}))
"""


def test_ctrl_c_stops_the_build_and_leaves_what_was_there(quantised: Path, tmp_path: Path) -> None:
    found = json.loads(run_python(INTERRUPTED, quantised, tmp_path))
    assert found["steps"] == 12  # not one step more
    assert found["left"].pop("cache").startswith("ptrt")  # what was measured is kept for the next build
    assert found["left"] == {"e": "the one before"}


COLLECTED = """
import gc, sys, threading
from pathlib import Path
from types import SimpleNamespace
from mtu_compile.core.errors import BuildError
from targets.nvidia.builder import check_graph
from targets.nvidia.library import collector, load_tensorrt

def collect_in_logger(frame, event, argument):
    # what Python does when it likes, here whenever the library logs
    if event == "call" and frame.f_code.co_name == "log" and gc.isenabled():
        gc.collect()

trt = load_tensorrt("tensorrt-rtx")
gc.disable()
alive = trt.Builder(collector(trt))  # with it, the constructor of the next one logs a warning
garbage = SimpleNamespace(builder=trt.Builder(collector(trt)))
garbage.itself = garbage
del garbage
gc.enable()
threading.setprofile(collect_in_logger)
for _ in range(3):
    try:
        check_graph(Path(sys.argv[1]), "tensorrt-rtx")
    except BuildError:
        print("refused")
"""


def test_objects_collected_while_the_library_logs_do_not_lock_it_up(tmp_path: Path) -> None:
    refused = write(tmp_path / "no.onnx", [node("Det", ["x"], ["y"], name="det")])
    assert run_python(COLLECTED, refused) == "refused\n" * 3


def run_python(code: str, *arguments: Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_missing_library_is_named_with_the_command(
    quantised: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, module in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
        monkeypatch.setitem(sys.modules, module, None)
        for attempt in (
            lambda kind=kind: check_graph(quantised, kind),
            lambda kind=kind: build_engine(quantised, tmp_path / "e", Recipe(), kind=kind),
        ):
            with pytest.raises(ToolchainMissing) as caught:
                attempt()
            assert caught.value.exit_code == EXIT_TOOLCHAIN
            assert "pip install 'mtu-compile[" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="'openvino'"):
        load_tensorrt("openvino")


def test_a_recipe_is_what_was_written() -> None:
    recipe = Recipe(1 << 30, ("8.6", "12.0"), 4, {"x": ((1, 4, 8, 8), (2, 4, 8, 8), (4, 4, 8, 8)), "t": ((1,),) * 3})
    assert recipe.to_config() == {
        "workspace_bytes": "1073741824",
        "compute_capabilities": "8.6,12.0",
        "optimization_level": "4",
        "profile.x": "1x4x8x8,2x4x8x8,4x4x8x8",
        "profile.t": "1,1,1",
    }
    assert Recipe.from_config(recipe.to_config()) == recipe
    assert Recipe().to_config() == {} and Recipe.from_config({}) == Recipe()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"device": "GPU"}, "no option 'device'"),
        ({"workspace_bytes": "1 GB"}, "'1 GB' is not a value"),
        ({"workspace_bytes": "0"}, "0 bytes"),
        ({"optimization_level": "6"}, "not between 0 and 5"),
        ({"compute_capabilities": "sm_89"}, "'sm_89' is not a compute capability"),
        ({"profile.x": "1x4,2x4"}, "'1x4,2x4' is not a value"),
        ({"profile.x": "1x4,2x4,4"}, "'x' are not three shapes of one rank"),
        ({"profile.x": "0x4,2x4,4x4"}, "'x' are not three shapes of one rank"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(config: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe.from_config(config)


#: What the bindings of TensorRT 10.3.0 and 11.1.0.106 both have, of what we use, by class: read off the listings that
#: NVIDIA's samples keep (NVIDIA/trt-samples-for-hackathon-cn, cookbook/07-Tool/ListAPIs/output; builder and its config
#: in that of 10.16.1.11 too). TensorRT-RTX is the installed one.
COMMON = {
    "trt": {
        *("Builder", "BuilderFlag", "ILogger", "IProgressMonitor", "MemoryPoolType", "NetworkDefinitionCreationFlag"),
        *("OnnxParser", "Runtime", "TensorIOMode", "__name__", "__version__"),
    },
    "BuilderFlag": {"TF32"},
    "MemoryPoolType": {"WORKSPACE"},
    "TensorIOMode": {"INPUT"},
    "ILogger": {"ERROR", "INTERNAL_ERROR", "WARNING", "__init__"},
    "IProgressMonitor": {"phase_finish", "phase_start", "step_complete", "__init__"},
    "Builder": {
        *("build_serialized_network", "create_builder_config", "create_network", "create_optimization_profile"),
    },
    "INetworkDefinition": {"get_input", "num_inputs", "num_outputs"},
    "ITensor": {"name", "shape"},
    "OnnxParser": {"get_error", "num_errors", "parse_from_file"},
    "ParserError": {"desc", "node", "node_name", "node_operator"},
    "IOptimizationProfile": {"set_shape"},
    "IBuilderConfig": {
        *("add_optimization_profile", "builder_optimization_level", "clear_flag", "create_timing_cache"),
        *("get_timing_cache", "progress_monitor", "set_memory_pool_limit", "set_timing_cache"),
    },
    "ITimingCache": {"serialize"},
    "Runtime": {"deserialize_cuda_engine"},
    "ICudaEngine": {
        *("create_execution_context", "get_tensor_dtype", "get_tensor_mode", "get_tensor_name", "get_tensor_shape"),
        *("get_tensor_profile_shape", "num_io_tensors"),
    },
    "IExecutionContext": {"execute_async_v3", "set_input_shape", "set_tensor_address"},
}
#: Only in TensorRT-RTX; used where the name was looked up before, or in its own engine class.
RTX_ONLY = {
    "trt": {"ComputeCapability", "CudaGraphStrategy"},
    "CudaGraphStrategy": {"WHOLE_GRAPH_CAPTURE"},
    "IBuilderConfig": {"num_compute_capabilities", "set_compute_capability"},
    "ICudaEngine": {"create_runtime_config"},
    "IRuntimeConfig": {"create_runtime_cache", "cuda_graph_strategy", "set_runtime_cache"},
    "IRuntimeCache": {"deserialize", "serialize"},
}
RTX_PLACES = {"_choose_gpus", "TensorRTRTXEngine"}
#: What our variables hold; in the places of TensorRT-RTX some hold something else.
VARIABLES = {
    "builder": "Builder",
    "cache": "ITimingCache",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "error": "ParserError",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "tensor": "ITensor",
    "trt": "trt",
}
RTX_VARIABLES = {**VARIABLES, "cache": "IRuntimeCache"}


def uses(tree: ast.AST, variables: dict[str, str]) -> set[tuple[str, str]]:
    """(class, attribute) of everything that is asked of the library's objects in ``tree``."""
    found = set()
    for part in ast.walk(tree):
        if isinstance(part, ast.Attribute):
            base = part.value
            if isinstance(base, ast.Name) and base.id in variables:
                found.add((variables[base.id], part.attr))
            elif isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name) and base.value.id == "trt":
                found.add((base.attr, part.attr))
    return found


def parts_of(modules: list[Any]) -> tuple[list[ast.stmt], list[ast.stmt]]:
    """Functions and classes of ``modules``: those for every version, and those only for TensorRT-RTX."""
    body = [part for module in modules for part in ast.parse(Path(module.__file__).read_text()).body]
    special = [part for part in body if getattr(part, "name", "") in RTX_PLACES]
    return [part for part in body if part not in special], special


def test_only_names_that_every_supported_version_has_are_used() -> None:
    common, special = parts_of([tensorrt_builder, tensorrt_engine, tensorrt_library])
    errors = {("ParserError", name) for name in ("__traceback__", "clear", "append", "strerror")}  # other errors
    used = {use for part in common for use in uses(part, VARIABLES)} - errors
    known = {(owner, name) for owner, names in COMMON.items() for name in names}
    assert used - known == set()
    assert len(used) > 30  # or the variables have other names by now
    assert len(special) == len(RTX_PLACES)
    runtime_config = {"TensorRTRTXEngine": "IRuntimeConfig", "_choose_gpus": "IBuilderConfig"}
    for part in special:
        variables = {**RTX_VARIABLES, "config": runtime_config[getattr(part, "name", "")]}
        allowed = known | {(owner, name) for owner, names in RTX_ONLY.items() for name in names}
        assert uses(part, variables) - allowed == set()


def test_the_installed_library_has_all_of_these_names() -> None:
    trt = load_tensorrt("tensorrt-rtx")
    for table in (COMMON, RTX_ONLY):
        for owner, names in table.items():
            found = trt if owner == "trt" else getattr(trt, owner)
            assert {name for name in names if not hasattr(found, name)} == set()
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED  # bit 1 in 10, bit 0 in 11
    assert 1 << int(flag) in (1, 2)
