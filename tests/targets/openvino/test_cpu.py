from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import targets.openvino.target
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.accuracy.host.compare import compare_runner
from mtu_compile.accuracy.host.engine_runner import EngineRunner
from mtu_compile.core.errors import BuildError, ConfigError, ModelError, MtuError, ToolchainMissing
from mtu_compile.runtime.engine import open_engine
from targets.base import Artifact
from targets.openvino.cpu import CpuTarget
from tests.recording import recorded_calls

pytestmark = pytest.mark.int8


def run(artifact: Artifact) -> EngineRunner:
    return EngineRunner(lambda: open_engine(artifact.kind, artifact.path, artifact.config))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "graphs")


@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 100), ("int8", 30), ("bf16", 30)])
def test_what_is_built_computes_the_graph(unet_like, feeds, run_reference, native_bf16, tmp_path, precision, least_db):
    target = CpuTarget()
    if precision == "bf16" and not native_bf16:
        pytest.skip("this CPU computes nothing in bf16")
    artifact = target.build(unet_like, tmp_path / "out", precision=precision)
    assert artifact.kind == "openvino"
    assert artifact.path == tmp_path / "out" / "openvino_model.xml"
    assert {file.name for file in artifact.files} == {"openvino_model.xml", "openvino_model.bin"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {file.name for file in artifact.files}
    assert artifact.toolchain.startswith("openvino 20")
    assert artifact.config["INFERENCE_PRECISION_HINT"] == ("bf16" if native_bf16 and precision != "fp32" else "f32")
    reference = [{"out_sample": run_reference(unet_like, feed)} for feed in feeds]
    steps = compare_runner(run(artifact), recorded_calls(feeds, reference))
    assert [step.timestep for step in steps] == [999, 777, 333, 1]
    assert min(step.sqnr_db for step in steps) > least_db
    assert leftovers(tmp_path) == ["out"]


def test_bf16_is_built_where_the_cpu_has_it_and_refused_elsewhere(unet_like, native_bf16, tmp_path):
    with nullcontext() if native_bf16 else pytest.raises(BuildError, match="no native bf16"):
        CpuTarget().build(unet_like, tmp_path / "out", precision="bf16")
    assert leftovers(tmp_path) == (["out"] if native_bf16 else [])


def test_bf16_stores_half_the_bytes(unet_like, tmp_path, monkeypatch):
    monkeypatch.setattr(CpuTarget, "_capabilities", lambda self: ("FP32", "BF16"))
    monkeypatch.setattr(targets.openvino.target, "prove_compiles", lambda *_: None)  # this CPU may have no bf16
    sizes = {}
    for precision in ("fp32", "bf16"):
        artifact = CpuTarget().build(unet_like, tmp_path / precision, precision=precision)
        sizes[precision] = artifact.path.with_suffix(".bin").stat().st_size
    assert sizes["bf16"] < 0.7 * sizes["fp32"]


def test_a_cpu_without_bf16_runs_int8_graphs_in_f32_and_refuses_bf16(unet_like, tmp_path, monkeypatch):
    monkeypatch.setattr(CpuTarget, "_capabilities", lambda self: ("FP32", "INT8"))
    artifact = CpuTarget().build(unet_like, tmp_path / "int8", precision="int8")
    assert artifact.config == {"device": "CPU", "INFERENCE_PRECISION_HINT": "f32"}
    with pytest.raises(BuildError, match="no native bf16"):
        CpuTarget().build(unet_like, tmp_path / "bf16", precision="bf16")
    assert leftovers(tmp_path) == ["int8"]


@pytest.mark.parametrize(("capability", "beside_int8"), [("BF16", "bf16"), ("FP32", "fp32")])
def test_networks_beside_the_unet_stay_float(monkeypatch, capability, beside_int8):
    monkeypatch.setattr(CpuTarget, "_capabilities", lambda self: (capability,))
    assert CpuTarget().companion_precision("int8") == beside_int8
    assert CpuTarget().companion_precision("fp32") == "fp32"


def test_without_openvino_the_install_command_is_named(unet_like, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    availability = CpuTarget().probe()
    assert not availability.ok and availability.version is None
    with pytest.raises(ToolchainMissing) as caught:
        CpuTarget().build(unet_like, tmp_path / "out", precision="fp32")
    assert caught.value.exit_code == 4
    assert "pip install" in caught.value.hint
    with pytest.raises(ToolchainMissing):
        open_engine("openvino", tmp_path, {})
    assert leftovers(tmp_path) == []


def test_the_machines_memory_is_known_without_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert CpuTarget().memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_damaged_graph_leaves_nothing_behind(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"\x00not a graph\xff" * 10)
    with pytest.raises(BuildError, match=r"cannot import bad\.onnx"):
        CpuTarget().build(tmp_path / "bad.onnx", tmp_path / "out", precision="fp32")
    with pytest.raises(ModelError, match="does not exist"):
        CpuTarget().build(tmp_path / "none.onnx", tmp_path / "out", precision="fp32")
    assert leftovers(tmp_path) == ["bad.onnx"]


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(OSError(28, "No space left on device"), MtuError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_build_cut_short_leaves_nothing_behind(unet_like, tmp_path, monkeypatch, raised, expected):
    def fail(*args: object, **kwargs: object) -> None:
        raise raised

    monkeypatch.setattr(targets.openvino.target, "prove_compiles", fail)
    with pytest.raises(expected):
        CpuTarget().build(unet_like, tmp_path / "out", precision="fp32")
    assert leftovers(tmp_path) == []


def test_an_existing_folder_is_only_taken_when_empty(unet_like, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="already exists"):
        CpuTarget().build(unet_like, tmp_path / "full", precision="fp32")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert CpuTarget().build(unet_like, tmp_path / "empty", precision="fp32").path.is_file()


def test_an_operation_openvino_does_not_know_is_a_build_error(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Mystery", ["x"], ["y"], domain="nowhere")], "g", info[:1], info[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(tmp_path / "mystery.onnx"))
    with pytest.raises(BuildError, match="Mystery"):
        CpuTarget().build(tmp_path / "mystery.onnx", tmp_path / "out", precision="fp32")
    assert leftovers(tmp_path) == ["mystery.onnx"]


def test_wrong_weights_are_seen(unet_like, feeds, run_reference, write_unet_like, tmp_path):
    other = write_unet_like(tmp_path / "graphs" / "other.onnx", scale=1.5)
    artifact = CpuTarget().build(other, tmp_path / "out", precision="fp32")
    reference = [{"out_sample": run_reference(unet_like, feed)} for feed in feeds]
    steps = compare_runner(run(artifact), recorded_calls(feeds, reference))
    assert max(step.sqnr_db for step in steps) < 10
    assert np.isclose(steps[0].sqnr_db, sqnr_db(reference[0]["out_sample"], 1.5 * reference[0]["out_sample"]), atol=0.1)
