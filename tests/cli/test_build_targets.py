"""The example, built for devices that are not here: what is built is real, and what is not run is said not to be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
from mtu_compile import bundle
from mtu_compile.bundle import EngineState
from mtu_compile.core.errors import ToolchainMissing

Run = Callable[..., Any]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "model"
QUICK = ("--int8", "--steps", 4, "--calibration-pictures", 2, "--check-pictures", 1)


@pytest.fixture(scope="module")
def rtx_bundle(build_once: Callable[..., Path]) -> Path:
    return build_once(EXAMPLE, "--target", "rtx-ada", "--task", "sr", "--no-mixed-precision", *QUICK)


@pytest.fixture(scope="module")
def rtx_here() -> bool:
    """Whether this machine has a GPU the bundle is for: then it was measured there."""
    return targets.get("rtx-ada").device_here()


@pytest.mark.heavy
def test_an_rtx_bundle_has_an_engine_built_with_or_without_a_gpu(rtx_bundle: Path, rtx_here: bool) -> None:
    manifest = bundle.read(rtx_bundle)
    for where, engine in manifest.engines():
        assert engine.kind == "tensorrt-rtx", where
        assert engine.prebuilt is not None
        assert (rtx_bundle / engine.prebuilt).stat().st_size > 100_000
        assert engine.state is (EngineState.MEASURED if rtx_here else EngineState.BUILT), engine.state_in_words
        assert engine.config["compute_capabilities"] == "8.9"
    entry = manifest.tasks["sr"]
    assert [record.id for record in entry.passes[-2:]] == ["mtu::legalise-qdq", "mtu::to-fp16"]
    assert entry.accuracy is not None and entry.accuracy["passed"]
    assert ("tensorrt" if rtx_here else "no GeForce RTX 40") in entry.accuracy["measured_with"]


@pytest.mark.heavy
def test_a_board_is_shown_what_the_bundle_brings(rtx_bundle: Path, mtu: Run) -> None:
    done = mtu("board", "info", rtx_bundle, "--json")
    assert done.code == 0, done.err
    engines = json.loads(done.out)["bundle"]["engines"]
    assert {one["state"] for one in engines} == {"prebuilt"}
    sizes = {one["graph"]: one["graph_bytes"] for one in engines}
    assert sizes["unet_sr/model.onnx"] == (rtx_bundle / "unet_sr" / "model.onnx").stat().st_size


@pytest.mark.heavy
def test_every_backend_of_the_build_machine_agrees(rtx_bundle: Path, rtx_here: bool, mtu: Run) -> None:
    parity = bundle.read(rtx_bundle).tasks["sr"].provenance.parity
    assert parity is not None
    assert [row.backend for row in parity.rows][:2] == ["ONNX Runtime CPU", "OpenVINO CPU, f32"]
    assert len(parity.rows) == (3 if rtx_here else 2)
    assert parity.failures == ()
    shown = mtu("inspect", rtx_bundle)
    assert shown.code == 0 and "OpenVINO CPU, f32" in shown.out and ("not run" in shown.out) is not rtx_here


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["unet_sr/model.engine", "unet_sr/model.onnx"])
def test_a_changed_engine_or_graph_in_the_bundle_is_refused(
    name: str, rtx_bundle: Path, tmp_path: Path, mtu: Run
) -> None:
    broken = Path(shutil.copytree(rtx_bundle, tmp_path / "broken"))
    content = bytearray((broken / name).read_bytes())
    content[-1] ^= 1
    (broken / name).write_bytes(content)
    done = mtu("check", broken)
    assert done.code == 5 and name in done.err


@pytest.mark.heavy
@pytest.mark.skipif(
    "not __import__('targets').get('intel-npu').probe().ok", reason="no NPU compiler; `make npu-compiler` sets it up"
)
def test_an_npu_bundle_has_a_blob_built_with_or_without_an_npu(tmp_path: Path, mtu: Run) -> None:
    out = tmp_path / "bundle"
    done = mtu("build", EXAMPLE, "--target", "intel-npu", "--task", "sr", *QUICK, "-o", out, "--json")
    assert done.code == 0, done.err
    manifest = bundle.read(out)
    engine = manifest.tasks["sr"].engine
    assert (engine.kind, engine.config["device"]) == ("openvino", "NPU")
    assert engine.prebuilt is not None and (out / engine.prebuilt).stat().st_size > 1_000_000
    assert engine.estimate is not None and 0.1 < (engine.estimate.latency_ms or 0) < 100
    assert "cost model" in engine.estimate.source
    here = targets.get("intel-npu").device_here()
    assert engine.state is (EngineState.MEASURED if here else EngineState.BUILT), engine.state_in_words
    assert json.loads(done.out)["engines"]["tasks.sr.engine"]["estimate"] == bundle.encode(engine.estimate)


def test_a_jetson_bundle_carries_graph_recipe_wheel_and_requirements(
    tiny_model: Path, tmp_path: Path, mtu: Run
) -> None:
    out = tmp_path / "bundle"
    options = ("--task", "t2i", "--no-wheels", "--accuracy-gate", "off", "--no-mixed-precision", *QUICK)
    done = mtu("build", tiny_model, "--target", "jetson-orin-nano", *options, "-o", out)
    assert done.code == 0, done.err
    manifest = bundle.read(out)
    engine = manifest.tasks["t2i"].engine
    assert (engine.kind, engine.prebuilt, engine.state) == ("tensorrt", None, EngineState.ON_BOARD)
    assert [path.name.split("-")[0] for path in (out / "wheels").iterdir()] == ["mtu_compile"]
    assert manifest.provenance.board is not None and manifest.provenance.board.compute_capability == "8.7"
    refused = mtu("run", out, "--task", "t2i", "--prompt", "a", "-o", tmp_path / "a.png")
    # no engine has been built, or there is nothing that could open one
    assert refused.code == (1 if targets.get("tensorrt").probe().ok else 4), refused.err
    assert "tensorrt" in refused.err and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(("--fp32",), id="fp32", marks=pytest.mark.heavy),
        pytest.param(("--int8", "--no-mixed-precision"), id="int8"),
    ],
)
def test_onnx_runtime_builds_checks_and_runs_on_this_cpu(
    tiny_model: Path, tmp_path: Path, mtu: Run, precision: tuple[str, ...]
) -> None:
    out = tmp_path / "bundle"
    quick = ("--steps", 4, "--check-pictures", 1, "--accuracy-gate", "warn")
    done = mtu("build", tiny_model, "--target", "onnxruntime", "--task", "t2i", *precision, *quick, "-o", out)
    assert done.code == 0, done.err
    manifest = bundle.read(out)
    for where, engine in manifest.engines():
        assert (engine.kind, engine.prebuilt, engine.config) == ("onnxruntime", None, {}), where
    entry = manifest.tasks["t2i"]
    assert entry.engine.state is EngineState.MEASURED
    assert entry.accuracy is not None and entry.accuracy["measured_with"].startswith("onnxruntime ")
    assert entry.accuracy["worst_sqnr_db"] > (10 if "--int8" in precision else 60)
    assert manifest.instruction_sets == ()  # ONNX Runtime cannot be told to be a lesser CPU
    ran = mtu("run", out, "--task", "t2i", "--prompt", "a", "--steps", 2, "-o", tmp_path / "a.png")
    assert ran.code == 0 and (tmp_path / "a.png").exists(), ran.err


def test_a_target_whose_toolchain_is_missing_says_what_installs_it(tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    if targets.get("tensorrt").probe().ok:
        pytest.skip("TensorRT is installed here")
    done = mtu("build", tiny_model, "--target", "tensorrt", "--fp16", "-o", tmp_path / "b")
    assert done.code == ToolchainMissing.exit_code
    assert "pip install" in done.err and not (tmp_path / "b").exists()


def test_a_precision_the_device_has_not_is_refused_before_anything_is_done(
    tiny_model: Path, tmp_path: Path, mtu: Run
) -> None:
    done = mtu("build", tiny_model, "--target", "jetson-orin", "--fp8", "-o", tmp_path / "b")
    assert done.code == 2 and "it takes int8, int8-weights, int4-weights, fp16, fp32" in done.err
