"""RTX targets, whose engines are really built here, and the same class where they are not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import passes
import targets
from mtu_compile.bundle import EngineRef, EngineState
from mtu_compile.core.errors import BuildError, ConfigError, ModelError, ToolchainMissing
from mtu_compile.core.progress import Progress
from mtu_compile.graph import io as graph_io
from mtu_compile.runtime.engine import open_engine
from passes.base import PassContext
from targets.nvidia import target as tensorrt
from targets.nvidia.builder import Recipe
from targets.nvidia.cuda import Device
from targets.nvidia.target import LOWERING, PORTABLE, TensorRTSpec, TensorRTTarget

NAMES = ("rtx", "rtx-ampere", "rtx-ada", "rtx-blackwell", "tensorrt")


def lower(graph: Path, out: Path, precision: Any) -> Path:
    """What the compiler does to a static graph before ``Target.build``."""
    return out if passes.run_pipeline(graph, out, LOWERING[precision], PassContext()) else graph


def write_quantised(path: Path) -> Path:
    """conv → Q/DQ → conv, float32 outside of the quantised layer, as NNCF leaves it; x and y f32 [1, 8, 8, 8]."""
    rng = np.random.default_rng(0)
    values = {
        "w_in": (rng.standard_normal((8, 8, 3, 3)) * 0.1).astype(np.float32),
        "s": np.float32(0.05),
        "z": np.int8(0),
        "w": rng.integers(-127, 128, (8, 8, 3, 3), dtype=np.int8),
        "s_w": np.full(8, 0.01, np.float32),
        "z_w": np.zeros(8, np.int8),
        "w_out": (rng.standard_normal((8, 8, 1, 1)) * 0.3).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w_in"], ["a"], name="conv_in", pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "s_w", "z_w"], ["dw"], name="dq_w", axis=0),
        helper.make_node("Conv", ["d", "dw"], ["b"], name="conv", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["b", "w_out"], ["y"], name="conv_out"),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 8, 8, 8]) for name in "xy"]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_fact_has_its_source(name: str) -> None:
    spec = targets.get(name).spec
    assert isinstance(spec, TensorRTSpec) and spec.built == "here"
    assert {"opset", "precisions", "memory_bytes", "compute_capabilities"} <= set(spec.sources)
    assert set(spec.precisions) <= set(spec.lowering)
    for precision in spec.precisions:
        ids = spec.lowering[precision]
        assert tuple(found.id for found in passes.builtin().pipeline(ids)) == ids
    assert Recipe.from_config(spec.recipe().to_config()) == spec.recipe()


def test_fp8_is_for_gpus_that_have_it() -> None:
    assert [name for name in NAMES if "fp8" in targets.get(name).spec.precisions] == ["rtx-ada", "rtx-blackwell"]


class Watcher(Progress):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.steps = 0

    def stage(self, title: str, total: int | None = None) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def watch() -> Any:
            self.stages.append(title)
            yield self._advance

        return watch()

    def _advance(self, units: int) -> None:
        self.steps += units


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_an_engine_is_built_beside_the_graph_it_was_built_from(unet_like: Path, tmp_path: Path, precision: Any) -> None:
    source = write_quantised(tmp_path / "q.onnx") if precision == "int8" else unet_like
    graph = lower(source, tmp_path / "lowered.onnx", precision)
    watcher = Watcher()
    artifact = tensorrt.RTX_ADA.build(graph, tmp_path / "out", precision=precision, progress=watcher)
    assert (artifact.kind, artifact.path) == ("tensorrt-rtx", tmp_path / "out" / "model.onnx")
    assert artifact.prebuilt == tmp_path / "out" / "model.engine"
    assert {file.name for file in artifact.files} == {"model.onnx", "model.engine"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.onnx", "model.engine"}
    assert artifact.config == {"compute_capabilities": "8.9"}
    assert artifact.toolchain.startswith("tensorrt_rtx 1.")
    assert artifact.estimate is None
    assert watcher.stages == ["tensorrt-rtx engine"] and watcher.steps > 10


def test_a_free_batch_gets_a_profile_of_all_kinds_of_guidance(tmp_path: Path) -> None:
    """One sample is not computed at the cost of three."""
    model = graph_io.load(write_quantised(tmp_path / "q.onnx"))
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(["batch", 8, 8, 8])
    for node in model.graph:
        for output in node.outputs:
            output.shape = ir.Shape(["batch", 8, 8, 8])
    graph = lower(graph_io.save(model, tmp_path / "free.onnx"), tmp_path / "lowered.onnx", "int8")
    artifact = tensorrt.RTX_ADA.build(graph, tmp_path / "out", precision="int8")
    assert artifact.config["profile.x"] == "1x8x8x8,2x8x8x8,3x8x8x8"
    assert tensorrt.RTX_ADA.spec.shared_batch is None and artifact.prebuilt is not None


def test_what_was_not_run_is_said_not_to_have_been(unet_like: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tensorrt, "device_info", lambda: gpu("8.7"))
    artifact = tensorrt.RTX_ADA.build(unet_like, tmp_path / "other", precision="fp32")
    assert (artifact.state, artifact.reason) == (EngineState.BUILT, "a GPU is none of its GPUs")
    monkeypatch.setattr(tensorrt, "device_info", no_gpu)
    artifact = tensorrt.RTX_ADA.build(unet_like, tmp_path / "none", precision="fp32")
    assert (artifact.state, artifact.reason) == (EngineState.BUILT, "no NVIDIA GPU on this machine")
    monkeypatch.setattr(tensorrt, "device_info", lambda: gpu("8.9"))
    artifact = tensorrt.RTX_ADA.build(unet_like, tmp_path / "it", precision="fp32")
    assert (artifact.state, artifact.reason) == (EngineState.BUILT, None)  # it could run, and did not yet


def gpu(capability: str) -> Device:
    return Device("a GPU", capability, 24 << 30, 20 << 30, "13.0")


def no_gpu() -> Device:
    from mtu_compile.core.errors import TargetError

    raise TargetError("no NVIDIA GPU on this machine", hint="install NVIDIA's driver")


def test_the_host_runs_the_very_graph(unet_like: Path, feeds: Any, run_reference: Any, tmp_path: Path) -> None:
    graph = lower(unet_like, tmp_path / "lowered.onnx", "fp16")
    artifact = tensorrt.RTX.build(graph, tmp_path / "out", precision="fp16")
    ref = EngineRef("tensorrt-rtx", "out/model.onnx", artifact.config, "out/model.engine")
    host = tensorrt.RTX.host_engine(ref)
    assert host == EngineRef("onnxruntime", "out/model.onnx", {})
    engine = open_engine(host.kind, tmp_path / host.path, host.config)
    wanted = run_reference(unet_like, feeds[0])
    found = engine(feeds[0])["out_sample"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())


def test_large_weights_go_along(unet_like: Path, tmp_path: Path) -> None:
    graph = graph_io.save(graph_io.load(unet_like), tmp_path / "in" / "lowered.onnx", external_bytes=0)
    assert graph.with_name("lowered.onnx.data").is_file()
    inside = tensorrt.RTX_ADA.build(unet_like, tmp_path / "a", precision="fp32")
    beside = tensorrt.RTX_ADA.build(graph, tmp_path / "b", precision="fp32")
    assert inside.prebuilt is not None and beside.prebuilt is not None
    assert inside.prebuilt.read_bytes() == beside.prebuilt.read_bytes()


def test_a_refused_graph_leaves_nothing_behind_and_names_the_node(tmp_path: Path) -> None:
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Det", ["x"], ["y"], name="up.det")], "g", info[:1], info[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    for name in ("rtx-ada", "jetson-orin"):  # a board's own parser is not here, but its relative is
        with pytest.raises(BuildError, match=r"node 'up\.det' \(Det\)"):
            targets.get(name).check_graph(tmp_path / "m.onnx", precision="fp16")
    with pytest.raises(BuildError, match=r"node 'up\.det' \(Det\)"):
        tensorrt.RTX.build(tmp_path / "m.onnx", tmp_path / "out", precision="fp32")
    with pytest.raises(ModelError, match="does not exist"):
        tensorrt.RTX.build(tmp_path / "none.onnx", tmp_path / "out", precision="fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="already exists"):
        tensorrt.RTX.build(tmp_path / "m.onnx", tmp_path / "full", precision="fp32")


def test_precisions_that_are_not_there_are_refused(unet_like: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'rtx' cannot be built in fp8"):
        tensorrt.RTX.build(unet_like, tmp_path / "out", precision="fp8")


def test_without_the_library_the_command_is_named(unet_like: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    availability = tensorrt.RTX.probe()
    assert not availability.ok and availability.version is None and "mtu-compile[rtx]" in availability.install_hint
    with pytest.raises(ToolchainMissing) as caught:
        tensorrt.RTX.build(unet_like, tmp_path / "out", precision="fp32")
    assert caught.value.exit_code == 4 and list(tmp_path.glob("out*")) == []
    tensorrt.RTX.check_graph(unet_like, precision="fp32")  # nobody to ask
    assert not tensorrt.RTX.device_here()
    assert tensorrt.RTX.memory() is None


def test_tensorrt_itself_needs_the_gpu_it_builds_for(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], "__version__", "10.3.0", raising=False)
    monkeypatch.setattr(tensorrt, "device_info", no_gpu)
    found = tensorrt.TENSORRT.probe()
    assert not found.ok and found.version == "10.3.0" and found.detail == "no NVIDIA GPU on this machine"
    assert tensorrt.RTX.probe().ok and "not run" in tensorrt.RTX.probe().detail
    monkeypatch.setattr(tensorrt, "device_info", lambda: gpu("9.0"))
    assert tensorrt.TENSORRT.probe().ok and tensorrt.TENSORRT.device_here()
    assert not tensorrt.RTX.device_here() and "9.0" not in PORTABLE


def test_a_device_that_is_here_is_asked_for_its_memory(monkeypatch: Any) -> None:
    monkeypatch.setattr(tensorrt, "device_info", lambda: gpu("8.9"))
    assert tensorrt.RTX_ADA.device_here() and not tensorrt.RTX_AMPERE.device_here()
    assert tensorrt.RTX_ADA.memory() == 24 << 30
    assert tensorrt.RTX_AMPERE.memory() is None


def test_networks_beside_the_unet_are_never_quantised() -> None:
    found = {p: tensorrt.RTX_ADA.companion_precision(p) for p in tensorrt.RTX_ADA.spec.precisions}
    assert found == {**dict.fromkeys(found, "fp16"), "bf16": "bf16", "fp32": "fp32"}


def test_a_board_gets_the_graph_and_the_recipe(unet_like: Path, tmp_path: Path, monkeypatch: Any) -> None:
    for module in ("tensorrt", "tensorrt_rtx", "cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, module, None)
    spec = TensorRTSpec(
        name="board",
        vendor="NVIDIA (TensorRT)",
        device="a board",
        precisions=("fp16",),
        opset=20,
        memory_bytes=8 << 30,
        kind="tensorrt",
        built="board",
        compute_capabilities=("8.7",),
        workspace_bytes=1 << 30,
        optimization_level=4,
    )
    board = TensorRTTarget(spec)
    assert board.probe().ok and not board.device_here()
    artifact = board.build(unet_like, tmp_path / "out", precision="fp16")
    assert artifact.state is EngineState.ON_BOARD and artifact.prebuilt is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.onnx"]
    assert Recipe.from_config(artifact.config) == Recipe(1 << 30, ("8.7",), 4)
    assert board.memory() == 8 << 30
