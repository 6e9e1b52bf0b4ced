"""Intel NPU targets: what a build leaves, with and without the compiler, and what it gives the compiler to compile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

import targets
import targets.npu.target as intel_npu
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.bundle import EngineRef, EngineState
from mtu_compile.core.errors import EXIT_TOOLCHAIN, ConfigError, ToolchainMissing
from mtu_compile.runtime.engine import open_engine
from targets.npu.compiler import Blob, CompilerFailed, find_compiler
from targets.npu.provider import Provider
from targets.npu.report import Busy, Layer, Report
from targets.npu.target import BLOB_NAME, LAYERS_NAME, IntelNpuSpec, IntelNpuTarget

NAMES = {"intel-npu": "4000", "intel-npu-3720": "3720", "intel-npu-4000": "4000", "intel-npu-5010": "5010"}
NO_NPU = "no Intel NPU on this machine"
IR = ["openvino_model.bin", "openvino_model.xml"]

needs_no_npu = pytest.mark.skipif("NPU" in openvino.Core().available_devices, reason="this machine has an Intel NPU")


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[openvino.Model, dict[str, Any]]]:
    """A compiler that takes everything; the models it was given, and how."""
    models: list[tuple[openvino.Model, dict[str, Any]]] = []

    def compile_blob(xml: Path, out: Path, **how: Any) -> Blob:
        models.append((openvino.Core().read_model(str(xml)).clone(), {"name": xml.parent.name, **how}))
        out.write_bytes(b"blob")
        layers = (Layer("conv_in", "Convolution", 0.0, 5.0, dpu_us=4.0), Layer("add", "Add", 5.0, 1.0))
        report = Report("2026", "npu=4000", 1.5, 1850.0, 10, 30, Busy(1.0, 0.5, 0.7, 0.2), layers)
        return Blob(out, 1.0, "0" * 64, 1.5, report, "a compiler, platform 4000; not measured")

    monkeypatch.setattr(intel_npu, "compile_blob", compile_blob)
    provider = Provider("native", "2026.4.1", "a stand-in", (), {}, traces=True)
    monkeypatch.setattr(intel_npu, "find_compiler", lambda: provider)
    return models


def write_quantised(path: Path) -> Path:
    """conv(x) in INT8 by Q/DQ: x f32 [1, 16, 8, 8] → y f32 [1, 16, 8, 8], int8 weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    values = {
        "s": np.float32(0.02),
        "z": np.int8(0),
        "w": rng.integers(-127, 127, (16, 16, 3, 3), dtype=np.int8),
        "ws": np.full(16, 0.001, np.float32),
        "wz": np.zeros(16, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"], name="dq"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wdq"], name="wdq", axis=0),
        helper.make_node("Conv", ["dq", "wdq"], ["y"], name="conv", pads=[1, 1, 1, 1]),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 8, 8]) for name in "xy"]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "q", info[:1], info[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


PRECISIONS = ("int8", "int8-weights", "fp16")


@pytest.mark.parametrize("name", NAMES)
def test_each_platform_is_a_spec_with_sources(name: str) -> None:
    spec = targets.get(name).spec
    assert isinstance(spec, IntelNpuSpec)
    assert (spec.name, spec.platform, spec.device, spec.precisions) == (name, NAMES[name], "NPU", PRECISIONS)
    assert {"platform", "processors", "precisions", "opset", "memory_bytes"} <= spec.sources.keys()
    for precision in ("fp32", "bf16", "fp8"):
        with pytest.raises(ConfigError, match=f"cannot be built in {precision}"):
            spec.check_precision(precision)


@needs_no_npu
def test_a_build_leaves_ir_blob_and_estimate(
    unet_like: Path, tmp_path: Path, given: list[tuple[openvino.Model, dict[str, Any]]]
) -> None:
    artifact = IntelNpuTarget().build(unet_like, tmp_path / "unet_edit", precision="int8")
    out = tmp_path / "unet_edit"
    assert sorted(path.name for path in out.iterdir()) == sorted([*IR, BLOB_NAME, LAYERS_NAME])
    assert sorted(path.name for path in artifact.files) == sorted([*IR, BLOB_NAME, LAYERS_NAME])
    assert (artifact.kind, artifact.path, artifact.prebuilt) == ("openvino", out / IR[1], out / BLOB_NAME)
    assert artifact.config["device"] == "NPU" and (artifact.state, artifact.reason) == (EngineState.BUILT, NO_NPU)
    assert artifact.estimate is not None
    assert artifact.estimate.latency_ms == 1.5 and "not measured" in artifact.estimate.source
    assert artifact.estimate.int8_share_of_operations == 0.75
    assert artifact.estimate.ms_by_type == {"Convolution": {"dpu": 0.004}}
    layers = json.loads((out / LAYERS_NAME).read_text())
    assert layers["latency_ms"] == 1.5 and [layer["name"] for layer in layers["layers"]] == ["conv_in", "add"]
    (_, how), *_ = given
    assert (how["name"], how["platform"]) == ("unet_edit", "4000")


def test_the_blob_has_the_inputs_the_runtime_gives(
    unet_like: Path, feeds: list[dict[str, Any]], tmp_path: Path, given: list[tuple[openvino.Model, dict[str, Any]]]
) -> None:
    artifact = IntelNpuTarget().build(unet_like, tmp_path / "unet", precision="fp16")
    ((model, _),) = given
    engine = open_engine("openvino", artifact.path, {"device": "CPU"})
    for port in (*model.inputs, *model.outputs):
        assert port.partial_shape.is_static and port.get_element_type() == openvino.Type.f32
    assert {port.any_name for port in model.inputs} == set(engine.inputs)
    assert engine.inputs["timestep"].dtype == np.float32
    constants = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
    assert any(node.get_element_type() == openvino.Type.f16 for node in constants)


def test_a_batch_that_is_left_open_is_one_on_the_npu(
    tmp_path: Path, given: list[tuple[openvino.Model, dict[str, Any]]]
) -> None:
    import onnx
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", info[:1], info[1:])
    path = tmp_path / "text.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    IntelNpuTarget().build(path, tmp_path / "text_encoder", precision="fp16")
    ((model, _),) = given
    assert model.input(0).partial_shape == openvino.PartialShape([1, 16])


def test_the_build_machine_runs_the_same_ir(
    unet_like: Path,
    feeds: list[dict[str, Any]],
    run_reference: Callable[..., np.ndarray],
    tmp_path: Path,
    given: list[tuple[openvino.Model, dict[str, Any]]],
) -> None:
    target = IntelNpuTarget()
    artifact = target.build(unet_like, tmp_path / "unet", precision="fp16")
    ref = target.host_engine(EngineRef("openvino", "unet/openvino_model.xml", artifact.config, f"unet/{BLOB_NAME}"))
    assert ref.config["device"] == "CPU" and ref.prebuilt is None
    engine = open_engine(ref.kind, tmp_path / ref.path, ref.config)
    for feed in feeds:
        assert sqnr_db(run_reference(unet_like, feed), engine(feed)["out_sample"]) > 50


def test_without_a_compiler_nothing_is_built_and_the_command_is_named(
    unet_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Provider:
        raise ToolchainMissing("there is no Intel NPU compiler", hint="make npu-compiler")

    monkeypatch.setattr(intel_npu, "find_compiler", none)
    availability = IntelNpuTarget().probe()
    assert not availability.ok and availability.install_hint == "make npu-compiler"
    with pytest.raises(ToolchainMissing, match="no Intel NPU compiler") as caught:
        IntelNpuTarget().build(unet_like, tmp_path / "unet", precision="int8")
    assert caught.value.exit_code == EXIT_TOOLCHAIN and caught.value.hint == "make npu-compiler"
    assert not (tmp_path / "unet").exists()


@needs_no_npu
def test_an_ir_alone_says_that_it_is_one(unet_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(intel_npu, "find_compiler")
    artifact = IntelNpuTarget(blob=False).build(unet_like, tmp_path / "unet", precision="fp16")
    assert artifact.prebuilt is None and artifact.estimate is None
    assert (artifact.state, artifact.reason) == (EngineState.AT_FIRST_USE, NO_NPU)
    assert sorted(path.name for path in (tmp_path / "unet").iterdir()) == IR


def test_a_model_the_compiler_refuses_leaves_nothing(
    unet_like: Path,
    tmp_path: Path,
    given: list[tuple[openvino.Model, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*args: Any, **how: Any) -> Blob:
        raise CompilerFailed("refused", command=(), exit_code=5, log="", stderr="", hint="")

    monkeypatch.setattr(intel_npu, "compile_blob", refuse)
    with pytest.raises(CompilerFailed):
        IntelNpuTarget().build(unet_like, tmp_path / "unet", precision="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graphs"]


@needs_no_npu
def test_without_an_npu_its_memory_is_unknown() -> None:
    target = IntelNpuTarget()
    assert not target.device_here()
    assert target.memory() is None
    assert target.companion_precision("int8") == "fp16"


@pytest.mark.parametrize("name", ["intel-npu", "intel-npu-3720", "intel-npu-5010"])
def test_an_int8_graph_becomes_a_blob_that_computes_in_int8(name: str, tmp_path: Path) -> None:
    """With the compiler itself."""
    try:
        find_compiler()
    except ToolchainMissing as error:
        pytest.skip(f"{error.message}; run: {error.hint}")
    artifact = targets.get(name).build(write_quantised(tmp_path / "q.onnx"), tmp_path / "unet", precision="int8")
    assert artifact.prebuilt is not None and artifact.prebuilt.read_bytes()[1:4] == b"ELF"
    assert artifact.estimate is not None and artifact.estimate.latency_ms is not None
    assert 0 < artifact.estimate.latency_ms < 1
    assert f"platform {NAMES[name]}" in artifact.estimate.source
    assert f"npu={NAMES[name]}" in (artifact.estimate.compatibility or "")
    if NAMES[name] != "3720":  # whose backend does not count operations
        assert (artifact.estimate.int8_share_of_operations or 0) > 0.9
    layers = json.loads((tmp_path / "unet" / LAYERS_NAME).read_text())["layers"]
    assert ("y", "Convolution") in [(layer["name"], layer["type"]) for layer in layers]


@pytest.mark.npu
def test_a_blob_loads_and_agrees_with_the_float_graph(
    unet_like: Path, feeds: list[dict[str, Any]], run_reference: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    """Proves that a blob exported here loads on the NPU it was made for, unchanged, and computes the graph."""
    artifact = IntelNpuTarget().build(unet_like, tmp_path / "unet", precision="fp16")
    engine: Any = open_engine("openvino", artifact.path, artifact.config, artifact.prebuilt)
    assert engine.warnings == (), "the driver did not take the blob, and the IR was compiled instead"
    for feed in feeds:
        assert sqnr_db(run_reference(unet_like, feed), engine(feed)["out_sample"]) > 30
