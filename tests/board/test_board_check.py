"""The check on the board: it passes what agrees, fails what does not, and needs no scikit-image."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from mtu_compile import bundle
from mtu_compile.board import check_bundle
from mtu_compile.bundle import keys, signature
from mtu_compile.cli.board import command
from mtu_compile.core.errors import AccuracyError, BundleError, TargetError


def spoil(root: Path, graph: str, weight: str, factor: float, *, output: str | None = None) -> None:
    """Multiply a weight of a graph, or rename its output, and make the bundle agree with itself again."""
    import onnx
    from onnx import numpy_helper

    path = root / graph
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == weight:
            changed = (numpy_helper.to_array(tensor) * factor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(changed, weight))
    if output is not None:
        model.graph.node[-1].output[0] = model.graph.output[0].name = output
    onnx.save(model, path)
    bundle.write(root, bundle.read(root, verify=False))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["check", *map(str, arguments)])


def test_networks_that_agree_pass(checked: Path) -> None:
    result = check_bundle(checked)
    assert result.failures == ()
    assert set(result.tasks) == {"t2i", "edit"}
    for task in result.tasks.values():
        assert len(task.metrics.steps) == 3 and task.worst_sqnr > 100 and task.worst_cosine > 0.999
        assert task.summary()["ssim"] > 0.999 and task.ssim_reason is None
    assert [d.direction for d in result.tasks["edit"].metrics.steps[0].guidance] == ["image", "text"]


def test_a_task_that_differs_fails_and_the_other_does_not(checked: Path) -> None:
    spoil(checked, "unet_edit/model.onnx", "w_out", 0.8)
    result = check_bundle(checked)
    assert result.failures and all(failure.startswith("edit: ") for failure in result.failures)
    assert result.tasks["edit"].mean_sqnr == pytest.approx(-20 * np.log10(0.2), abs=0.1)


def test_a_wrong_decoder_is_seen_in_the_pictures(checked: Path) -> None:
    spoil(checked, "vae_decoder/model.onnx", "w", 0.5)
    failures = check_bundle(checked).failures
    assert any("image_psnr_db" in failure for failure in failures)
    assert not any("sqnr_db" in failure.split(" ")[1] for failure in failures)


def test_without_scikit_image_ssim_is_null_with_the_reason(checked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    for module in ("skimage.metrics", "skimage.color"):
        monkeypatch.setitem(sys.modules, module, None)
    task = check_bundle(checked).tasks["t2i"].to_json()
    assert task["ssim"] is None and "scikit-image" in task["ssim_reason"]
    assert task["thresholds"]["ssim"] is None and task["image_psnr_db"] > 100 and task["passed"]
    assert task["colour_difference"] is None and "scikit-image" in task["reasons"]["colour_difference"]


def test_a_board_measures_regions_and_pooled_guidance_but_nothing_that_needs_torch(checked: Path) -> None:
    tasks = {name: task.to_json() for name, task in check_bundle(checked).tasks.items()}
    edit, t2i = tasks["edit"], tasks["t2i"]
    assert edit["region"]["kind"] == "edit" and t2i["region"] is None
    assert edit["thresholds"]["inside_psnr_db"] and t2i["thresholds"]["inside_psnr_db"] is None
    assert "whole picture" in t2i["reasons"]["inside_psnr_db"]
    assert set(edit["guidance"]) == {"image", "text"} and edit["guidance"]["image"]["ratio"] == pytest.approx(1)
    for task in tasks.values():
        assert task["vif"] is None and task["thresholds"]["vif"] is None and "torch" in task["reasons"]["vif"]
        assert task["thresholds"]["truth_drop_db"] is None and len(task["picture_metrics"]) == task["pictures"] == 1


def test_a_renamed_output_is_an_error(checked: Path) -> None:
    spoil(checked, "unet/model.onnx", "", 1.0, output="something_else")
    with pytest.raises(AccuracyError, match="something_else"):
        check_bundle(checked)


def test_a_bundle_without_references_says_so(checked: Path) -> None:
    manifest = bundle.read(checked)
    tasks = {name: replace(entry, reference=None) for name, entry in manifest.tasks.items()}
    bundle.write(checked, replace(manifest, tasks=tasks))
    with pytest.raises(BundleError, match="no reference for task 't2i'"):
        check_bundle(checked)


def test_the_command_prints_verdicts_and_fails_with_exit_code_3(checked: Path) -> None:
    passed = run(checked, "--json")
    assert passed.exit_code == 0, passed.exception
    body: dict[str, Any] = json.loads(passed.stdout)
    assert body["passed"] and body["tasks"]["t2i"]["pictures"] == 1
    assert "pass" in run(checked).stdout
    spoil(checked, "unet/model.onnx", "w_out", 0.5)
    failed = run(checked)
    assert isinstance(failed.exception, AccuracyError) and failed.exception.exit_code == 3
    assert "FAIL" in failed.stdout and "t2i: sqnr_db below 30 at 3 of 3 calls, worst" in failed.exception.message
    assert json.loads(run(checked, "--json").stdout)["passed"] is False


def test_networks_that_are_not_built_are_not_replaced_by_others(checked: Path) -> None:
    manifest = bundle.read(checked)
    tasks = {
        name: replace(entry, engine=replace(entry.engine, kind="tensorrt", config={"compute_capabilities": "8.7"}))
        for name, entry in manifest.tasks.items()
    }
    bundle.write(checked, replace(manifest, tasks=tasks))
    with pytest.raises(TargetError):
        check_bundle(checked)


def test_a_board_runs_only_what_is_signed_by_whom_it_trusts(checked: Path, tmp_path: Path) -> None:
    key = keys.new_private()
    keys.write_pair(tmp_path / "key", key)
    trust = ("--trust", tmp_path / "key.pub")
    assert "is not signed" in str(run(checked, *trust).exception)
    signature.sign(checked, key, release=1)
    assert run(checked, *trust).exit_code == 0
    spoil(checked, "unet/model.onnx", "w_out", 1.0)  # writes the manifest anew, as somebody without the key can
    assert run(checked).exit_code == 0
    assert isinstance(refused := run(checked, *trust).exception, BundleError) and "is not signed" in refused.message
