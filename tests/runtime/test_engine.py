"""Engines: real tiny OpenVINO models, and every way to open or feed one wrongly."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from mtu_compile.core.errors import EXIT_TOOLCHAIN, ConfigError, TargetError, ToolchainMissing
from mtu_compile.runtime.engine import Engine, open_engine
from targets.openvino.engine import reason

F32 = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """total = 2 a + n, count = n; a is [2, 3] float32, n is [?] int64."""
    a = ops.parameter([2, 3], np.float32, name="a")
    n = ops.parameter(openvino.PartialShape([-1]), np.int64, name="n")
    total = ops.add(ops.multiply(a, ops.constant(np.float32(2))), ops.convert(n, "f32"))
    count = ops.reduce_sum(n, ops.constant(np.int64(0)))
    for node, names in ((a, {"a", "17"}), (n, {"n"}), (total, {"total", "/Add_output_0"}), (count, {"count"})):
        node.output(0).set_names(names)
    path = tmp_path_factory.mktemp("engine") / "net.xml"
    openvino.save_model(openvino.Model([total, count], [a, n], "net"), path, compress_to_fp16=False)
    return path


@pytest.fixture
def engine(model: Path) -> Engine:
    return open_engine("openvino", model, F32)


A, N = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([5], dtype=np.int64)


def test_specs_and_results(engine: Engine) -> None:
    assert {name: (spec.shape, spec.dtype) for name, spec in engine.inputs.items()} == {
        "a": ((2, 3), np.float32),
        "n": ((None,), np.int64),
    }
    assert str(engine.inputs["n"]) == "int64 [?]"
    assert list(engine.outputs) == ["total", "count"]
    results = engine({"a": A, "n": N})
    np.testing.assert_array_equal(results["total"], 2 * A + 5)
    assert results["count"] == 5


def test_results_belong_to_the_caller(engine: Engine) -> None:
    first = engine({"a": A, "n": N})["total"]
    kept = first.copy()
    engine({"a": A + 100, "n": N})
    np.testing.assert_array_equal(first, kept)


def test_inputs_are_not_written_and_may_be_any_view(engine: Engine) -> None:
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    view = base.T[:2]
    frozen = N.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(engine({"a": view, "n": frozen})["total"], 2 * view + 5)
    np.testing.assert_array_equal(base, np.arange(12).reshape(3, 4))


def test_a_buffer_changed_between_runs_is_read_again(engine: Engine) -> None:
    buffer = A.copy()
    inputs = {"a": buffer, "n": N}
    engine(inputs)
    buffer += 1
    np.testing.assert_array_equal(engine(inputs)["total"], 2 * (A + 1) + 5)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"a": A}, "needs an input 'n'"),
        ({"a": A, "n": N, "x": N}, "has no input 'x'; it takes a, n"),
        ({"a": A[:1], "n": N}, r"takes 'a' as float32 \[2, 3\], and was given float32 \[1, 3\]"),
        ({"a": A[None], "n": N}, r"was given float32 \[1, 2, 3\]"),
        ({"a": A.astype(np.float64), "n": N}, r"was given float64 \[2, 3\]"),
        ({"a": A, "n": N.astype(np.int32)}, r"takes 'n' as int64 \[\?\], and was given int32 \[1\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(engine: Engine, inputs: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        engine(inputs)


def test_a_closed_engine_says_so(engine: Engine) -> None:
    engine.close()
    engine.close()
    with pytest.raises(TargetError, match="closed"):
        engine({"a": A, "n": N})


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "auto", "MULTI:CPU", "HETERO:CPU", "BATCH:CPU"])
def test_devices_that_choose_for_themselves_are_refused(model: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="leave the choice"):
        open_engine("openvino", model, {**F32, "device": device})


def test_a_device_that_is_not_there_is_an_error_and_not_a_cpu(model: Path) -> None:
    with pytest.raises(TargetError, match=r"no device 'NPU\.7'") as caught:
        open_engine("openvino", model, {"device": "NPU.7"})
    assert "CPU" in str(caught.value.hint)


@pytest.mark.parametrize("option", ["CACHE_DIR", "CONFIG_FILE", "WEIGHTS_PATH"])
def test_options_that_reach_outside_the_bundle_are_refused(model: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        open_engine("openvino", model, {option: "/tmp/elsewhere"})


def test_unknown_kinds_are_refused(model: Path) -> None:
    with pytest.raises(TargetError, match="'coreml' are not known") as caught:
        open_engine("coreml", model, {})
    assert "openvino" in str(caught.value.hint)


def test_files_openvino_cannot_read_are_a_short_error(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "net.xml"
    broken.write_text("<net")
    (tmp_path / "net.bin").write_bytes(b"")
    with pytest.raises(TargetError, match="cannot load") as caught:
        open_engine("openvino", broken, F32)
    assert "\n" not in caught.value.message
    broken.write_bytes(model.read_bytes())  # weights missing
    with pytest.raises(TargetError, match="cannot load"):
        open_engine("openvino", broken, F32)


def test_missing_openvino_is_named_with_the_command(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ToolchainMissing) as caught:
        open_engine("openvino", model, F32)
    assert caught.value.exit_code == EXIT_TOOLCHAIN
    assert caught.value.hint == "pip install 'mtu-compile[openvino]'"


def test_the_reason_is_picked_out_of_a_vendor_message() -> None:
    places = "Exception from src/inference/src/cpp/core.cpp:104:\nCheck 'x' failed at a.cpp:1:\n"
    assert reason(RuntimeError(f"{places}wrong value f8\n\n")) == "wrong value f8"
    listed = "Failed with X:\nNot converted.\nSummary:\n-- No rule for Foo\n"
    assert reason(RuntimeError(places + listed)) == "No rule for Foo"
    assert reason(RuntimeError()) == "RuntimeError"
