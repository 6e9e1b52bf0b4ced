from __future__ import annotations

import subprocess
import sys

import pytest

import targets
from mtu_compile.accuracy.thresholds import Thresholds
from mtu_compile.core.errors import ConfigError, ToolchainMissing
from targets.base import Availability


def test_every_name_gives_the_target_of_that_name():
    assert "cpu" in targets.names()
    for name in targets.names():
        spec = targets.get(name).spec
        assert spec.name == name
        assert spec.precisions and spec.vendor and spec.device
        assert {"opset", "precisions", "memory_bytes", "shared_batch"} <= set(spec.sources)
        assert spec.shared_batch in (None, 1)  # a single sample never costs what three do
        targets.get(name).probe()


def test_every_precision_of_every_target_has_accuracy_thresholds():
    for name in targets.names():
        for precision in targets.get(name).spec.precisions:
            assert Thresholds.default(precision)["sqnr_db"] is not None


def test_every_pipeline_is_made_of_passes_that_exist_in_an_order_they_allow():
    import passes

    for pipeline in (passes.TASK_PIPELINE, passes.SHARED_PIPELINE):
        assert tuple(found.id for found in passes.builtin().pipeline(pipeline)) == pipeline


def test_every_lowering_is_made_of_passes_that_exist_and_may_follow_the_pipeline():
    import passes

    for name in targets.names():
        spec = targets.get(name).spec
        for ids in spec.lowering.values():
            whole = (*passes.TASK_PIPELINE, *ids)
            assert tuple(found.id for found in passes.builtin().pipeline(whole)) == whole, name


def test_an_unknown_name_is_a_usage_error_that_says_the_closest():
    with pytest.raises(ConfigError, match="unknown target 'cpuu'") as caught:
        targets.get("cpuu")
    assert caught.value.exit_code == 2
    assert "cpu" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        targets.get("toaster")
    assert "cpu" in caught.value.hint


def test_an_unknown_precision_names_the_known_ones():
    with pytest.raises(ConfigError, match="fp8") as caught:
        targets.get("cpu").spec.check_precision("fp8")
    assert "int8" in caught.value.hint


def test_a_missing_toolchain_ends_with_exit_code_4_and_the_install_command():
    Availability(True, "openvino", "1", "pip install x").require("cpu")
    with pytest.raises(ToolchainMissing, match="'cpu' needs openvino: no module") as caught:
        Availability(False, "openvino", None, "pip install x", "no module").require("cpu")
    assert (caught.value.exit_code, caught.value.hint) == (4, "pip install x")


def test_importing_the_packages_loads_no_toolchain():
    code = (
        "import sys, targets, calibration, targets.base, targets.openvino.cpu, mtu_compile.accuracy.host.compare\n"
        "heavy = {'openvino', 'onnx', 'nncf', 'torch', 'polygraphy', 'skimage'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_two_targets_of_one_name_are_refused(monkeypatch):
    place = "targets.onnxruntime.target:TARGETS"
    monkeypatch.setattr(targets.vendors, "targets", lambda: (place, place))
    targets._by_name.cache_clear()
    try:
        with pytest.raises(ConfigError, match="two targets are called 'onnxruntime'"):
            targets.names()
    finally:
        targets._by_name.cache_clear()
