from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import targets.openvino.gpu
from mtu_compile.accuracy.host.compare import compare_runner
from mtu_compile.accuracy.host.engine_runner import EngineRunner
from mtu_compile.bundle import EngineRef, EngineState
from mtu_compile.core.errors import BuildError, ConfigError, TargetError, ToolchainMissing
from mtu_compile.runtime.engine import open_engine
from targets.openvino.gpu import IntelGpuTarget
from targets.openvino.host import HOST_CONFIG
from targets.openvino.ir import free_batch, read_graph, whole_timesteps, write_ir
from tests.recording import recorded_calls


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IntelGpuTarget, "device_here", lambda self: False)


def reference_of(artifact: Any) -> EngineRef:
    return EngineRef(
        artifact.kind, str(artifact.path), artifact.config, artifact.prebuilt, artifact.state, artifact.reason
    )


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("precision", "hint", "least_db"), [("fp32", "f32", 100), ("fp16", "f16", 40)])
def test_what_is_built_without_a_gpu_computes_the_graph_on_the_cpu(
    unet_like, feeds, run_reference, tmp_path, precision, hint, least_db
):
    target = IntelGpuTarget()
    artifact = target.build(unet_like, tmp_path / "out", precision=precision)
    assert artifact.config == {"device": "GPU", "INFERENCE_PRECISION_HINT": hint}
    assert (artifact.state, artifact.reason) == (EngineState.BUILT, "no Intel GPU on this machine")
    assert artifact.prebuilt is None and artifact.estimate is None
    assert {file.name for file in artifact.files} == {"openvino_model.xml", "openvino_model.bin"}
    host = target.host_engine(reference_of(artifact))
    assert host.config == HOST_CONFIG
    engine = open_engine(host.kind, Path(host.path), host.config)
    wanted = [{"out_sample": run_reference(unet_like, feed)} for feed in feeds]
    assert min(step.sqnr_db for step in compare_runner(EngineRunner(engine), recorded_calls(feeds, wanted))) > least_db


@pytest.mark.usefixtures("no_gpu")
def test_half_precision_is_half_the_file(unet_like, tmp_path):
    sizes = {
        precision: IntelGpuTarget()
        .build(unet_like, tmp_path / precision, precision=precision)
        .path.with_suffix(".bin")
        .stat()
        .st_size
        for precision in ("fp32", "fp16", "int8")
    }
    assert sizes["fp16"] < 0.7 * sizes["fp32"]
    assert IntelGpuTarget().companion_precision("int8") == "fp16"
    assert IntelGpuTarget().companion_precision("fp32") == "fp32"


def test_a_gpu_that_is_not_there_is_an_error_and_never_another_device(unet_like, tmp_path):
    target = IntelGpuTarget()
    if target.device_here():
        pytest.skip("this machine has an Intel GPU")
    artifact = target.build(unet_like, tmp_path / "out", precision="fp16")
    with pytest.raises(TargetError, match="no device 'GPU' on this machine"):
        open_engine(artifact.kind, artifact.path, artifact.config)
    assert target.probe().ok and target.probe().detail == "no Intel GPU on this machine"
    assert target.memory() is None


def test_bf16_is_refused_with_what_there_is(unet_like, tmp_path):
    with pytest.raises(ConfigError, match="bf16") as caught:
        IntelGpuTarget().build(unet_like, tmp_path / "out", precision="bf16")
    assert "int8, int8-weights, int4-weights, fp16, fp32" in caught.value.hint


def test_without_openvino_the_install_command_is_named(unet_like, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    target = IntelGpuTarget()
    assert not target.device_here() and not target.probe().ok
    with pytest.raises(ToolchainMissing) as caught:
        target.build(unet_like, tmp_path / "out", precision="fp16")
    assert caught.value.exit_code == 4 and "pip install" in caught.value.hint
    assert target.memory() is None


def test_a_graph_openvino_cannot_read_is_named_early(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Mystery", ["x"], ["y"], domain="nowhere")], "g", info[:1], info[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(tmp_path / "mystery.onnx"))
    with pytest.raises(BuildError, match="Mystery"):
        IntelGpuTarget().check_graph(tmp_path / "mystery.onnx", precision="fp16")


def test_where_a_gpu_is_its_compiler_runs_and_may_refuse(unet_like, tmp_path, monkeypatch):
    """There is none here: the call goes to OpenVINO for real, which has no such device, and nothing is left behind."""
    monkeypatch.setattr(IntelGpuTarget, "device_here", lambda self: True)
    with pytest.raises(BuildError, match=r"cannot compile openvino_model\.xml for GPU"):
        IntelGpuTarget(targets.openvino.gpu.SPEC).build(unet_like, tmp_path / "out", precision="fp16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_ir_takes_what_openvino_genai_gives(unet_like, feeds, run_reference, no_gpu, tmp_path, precision):
    """int64 timesteps, and another batch than it was built for: a sample's answer does not depend on the others."""
    import openvino

    artifact = IntelGpuTarget().build(unet_like, tmp_path / "out", precision=precision)
    core = openvino.Core()
    for rows in ([0], [1, 0], [0, 1, 1]):
        model = core.read_model(str(artifact.path))
        assert model.input("timestep").get_element_type() == openvino.Type.i64
        model.reshape({"sample": [len(rows), 4, 8, 8], "timestep": [1]})
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for feed in feeds:
            whole = {"sample": feed["sample"][rows], "timestep": feed["timestep"].astype(np.int64)}
            wanted = run_reference(unet_like, feed)[rows]
            np.testing.assert_allclose(compiled(whole)[0], wanted, atol=1e-5 if precision == "fp32" else 2e-2)


def test_our_engine_still_stops_between_timesteps(unet_like, run_reference, no_gpu, tmp_path):
    target = IntelGpuTarget()
    host = target.host_engine(reference_of(target.build(unet_like, tmp_path / "out", precision="fp32")))
    engine = open_engine(host.kind, Path(host.path), host.config)
    sample = np.zeros((2, 4, 8, 8), np.float32)
    answers = []
    for value in (333.0, 333.5):
        feed = {"sample": sample, "timestep": np.array([value], np.float32)}
        answers.append(engine(feed)["out_sample"])
        np.testing.assert_allclose(answers[-1], run_reference(unet_like, feed), atol=1e-4)
    assert np.abs(answers[0] - answers[1]).max() > 0.01


def test_whole_timesteps_survive_low_precision(unet_like, feeds, run_reference, native_bf16, tmp_path):
    """OpenVINO GenAI on a CPU runs in bf16 unless told otherwise, where timestep 999 would be 1000."""
    import openvino

    from mtu_compile.accuracy.formulas import sqnr_db
    from targets.openvino.ir import keep_angles_precise

    model = read_graph(unet_like)
    assert free_batch(model) and keep_angles_precise(model) == 1 and whole_timesteps(model)
    path = write_ir(model, tmp_path, fp16_weights=True)
    compiled = openvino.Core().compile_model(
        str(path), "CPU", {"INFERENCE_PRECISION_HINT": "bf16" if native_bf16 else "f32"}
    )
    for feed in feeds:
        whole = {**feed, "timestep": feed["timestep"].astype(np.int64)}
        assert sqnr_db(run_reference(unet_like, feed), compiled(whole)[0]) > 30


def test_networks_without_a_timestep_are_left_alone(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", info[:1], info[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(tmp_path / "g.onnx")
    )
    model = read_graph(tmp_path / "g.onnx")
    assert not free_batch(model) and not whole_timesteps(model)


def test_samples_that_are_mixed_keep_their_batch(tmp_path):
    """A graph that adds its two samples cannot take three, and says so instead of computing something else."""
    import onnx
    import openvino
    from onnx import TensorProto, helper, numpy_helper

    nodes = [helper.make_node("Reshape", ["x", "flat"], ["f"]), helper.make_node("Mul", ["f", "w"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6])],
        [
            numpy_helper.from_array(np.array([6], np.int64), "flat"),
            numpy_helper.from_array(np.arange(6, dtype=np.float32), "w"),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(tmp_path / "g.onnx")
    )
    model = read_graph(tmp_path / "g.onnx")
    assert not free_batch(model)
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(openvino.Core().compile_model(model, "CPU")(x)[0], np.arange(6, dtype=np.float32))


def test_a_text_encoder_takes_any_number_of_prompts(no_gpu, tmp_path):
    """The state at each prompt's end token, as CLIP's pooled output has it, in a graph frozen for one prompt."""
    import onnx
    import openvino
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"]),
        helper.make_node("ArgMax", ["input_ids"], ["end"], axis=1, keepdims=1),
        helper.make_node("Concat", ["first", "end"], ["where"], axis=1),
        helper.make_node("GatherND", ["last_hidden_state", "where"], ["pooler_output"]),
    ]
    table = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, 6])],
        [
            helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, [1, 6, 4]),
            helper.make_tensor_value_info("pooler_output", TensorProto.FLOAT, [1, 4]),
        ],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.zeros((1, 1), np.int64), "first")],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(tmp_path / "g.onnx")
    )
    artifact = IntelGpuTarget().build(tmp_path / "g.onnx", tmp_path / "out", precision="fp32")
    compiled = openvino.Core().compile_model(str(artifact.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for prompts in (1, 3):
        ids = np.stack([np.roll(np.array([49, 1, 2, 3, 4, 5]), shift) for shift in range(prompts)])
        made = compiled({"input_ids": ids})
        np.testing.assert_array_equal(made["last_hidden_state"], table[ids])
        np.testing.assert_array_equal(made["pooler_output"], np.tile(table[49], (prompts, 1)))
