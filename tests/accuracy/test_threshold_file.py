"""A model's thresholds: what a file may say, what it is refused for, and what is suggested from measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtu_compile.accuracy.calls import GuidanceMetrics, StepMetrics
from mtu_compile.accuracy.metrics import METRICS
from mtu_compile.accuracy.task_metrics import TaskMetrics
from mtu_compile.accuracy.threshold_file import (
    FORMAT,
    STEP_CACHE,
    for_tasks,
    laxer_than_defaults,
    read_thresholds,
    suggest,
    suggested,
)
from mtu_compile.accuracy.thresholds import Thresholds, judge
from mtu_compile.accuracy.verdict import TaskCheck
from mtu_compile.core.errors import ConfigError, ModelError
from tests.accuracy.measured import metrics_of


def write(path: Path, thresholds: Any, **more: Any) -> Path:
    path.write_text(json.dumps({"format": FORMAT, "thresholds": thresholds, **more}))
    return path


def step(sqnr: float = 30.0, cosine: float = 0.995, ratio: float = 0.96, delta_cosine: float = 0.97) -> StepMetrics:
    delta = GuidanceMetrics("text", ratio, delta_cosine, 1.0, ratio**2, 0.01)
    return StepMetrics(500.0, sqnr, cosine, 0.1, 0.01, (delta,))


def test_what_a_file_says_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", {"int8": {"t2i": {"sqnr_db": 20, "vif": None}}, "bf16": {"sr": {}}})
    thresholds = read_thresholds(path)
    assert thresholds == {"int8": {"t2i": {"sqnr_db": 20.0, "vif": None}}, "bf16": {"sr": {}}}
    assert for_tasks(thresholds, "int8", ["t2i", "sr"], path) == {"t2i": {"sqnr_db": 20.0, "vif": None}, "sr": {}}
    assert for_tasks(thresholds, "fp32", ["t2i", "sr"], path) == {"t2i": {}, "sr": {}}
    with pytest.raises(ConfigError, match="'sr', which is not there"):
        for_tasks(thresholds, "int8", ["t2i"], path)


def test_pictures_with_a_step_cache_have_thresholds_of_their_own(tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", {"step-cache": {"t2i": {"ssim": 0.95, "image_psnr_db": None}}})
    thresholds = read_thresholds(path)
    assert for_tasks(thresholds, STEP_CACHE, ["t2i"], path) == {"t2i": {"ssim": 0.95, "image_psnr_db": None}}
    assert for_tasks(thresholds, "int8", ["t2i"], path) == {"t2i": {}}
    with pytest.raises(ConfigError, match=r"thresholds.step-cache.t2i.sqnr_db is there, expected a metric: latent"):
        read_thresholds(write(path, {"step-cache": {"t2i": {"sqnr_db": 20.0}}}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"int8": {"t2i": {"sharpness": 1.0}}},
            r"thresholds.int8.t2i.sharpness is there, expected a metric: sqnr_db",
        ),
        ({"int8": {"t2i": {"colour_difference": 1.0}}}, "expected a metric"),
        ({"int9": {}}, r"thresholds.int9 is there, expected a precision: int8"),
        ({"int8": {"t2i": {"ssim": "0.9"}}}, r'thresholds.int8.t2i.ssim is "0.9", expected a number'),
        ({"int8": {"t2i": {"ssim": True}}}, "ssim is true"),
        ({"int8": {"t2i": {"ssim": 1e400}}}, "Infinity is no number"),
        ({"int8": {"t2i": {"sqnr_db": float("nan")}}}, "NaN is no number"),
        ({"int8": {"t2i": {"sqnr_db": 1000}}}, "from -400 to 400"),
        ({"int8": {"t2i": {"guidance_ratio": 0}}}, "from 0.001 to 1"),
        ({"int8": {"t2i": {"guidance_ratio": 1.5}}}, "from 0.001 to 1"),
        ({"int8": {"../t2i": {}}}, "letters, digits"),
        ({"int8": {"t2i": [1]}}, "expected an object"),
        ([], "expected an object"),
    ],
)
def test_what_is_no_threshold_is_refused_by_name(content: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.json", content)
    for error in (ConfigError, ModelError):
        with pytest.raises(error, match=message) as caught:
            read_thresholds(path, error=error)
        assert str(path) in caught.value.message and "--suggest-thresholds" in str(caught.value.hint)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for text, message in (("{", "not JSON"), ("[]", "format is missing"), ('{"format": "x"}', 'expected "mtu-thr')):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_thresholds(tmp_path / "t.json")
    with pytest.raises(ConfigError, match="surprise"):
        read_thresholds(write(tmp_path / "t.json", {}, surprise=1))
    with pytest.raises(ConfigError, match="is missing"):
        read_thresholds(tmp_path / "none.json")


def test_suggestions_leave_a_margin_and_pass_what_they_were_made_from(tmp_path: Path) -> None:
    measured = metrics_of((step(), step(sqnr=28.34, ratio=1.1)), ssim=0.991, vif=0.85, truth_drop_db=-0.1)
    check = TaskCheck(measured, Thresholds.default("int8").without(["vif"]), 1, ())
    file = suggest({"t2i": check}, "int8")
    limits = file["thresholds"]["int8"]["t2i"]
    assert limits["sqnr_db"] == 22.3  # 28.34 less 6, to the lenient side
    assert limits["cosine"] == pytest.approx(1 - 3 * 0.005)
    assert limits["guidance_ratio"] == pytest.approx(1 - 3 * (1 - 1 / 1.1), abs=0.01)
    assert limits["guidance_cosine"] == pytest.approx(0.91)
    assert limits["ssim"] == pytest.approx(0.941, abs=0.002) and limits["truth_drop_db"] == 0.3
    assert "vif" not in limits  # not judged where it was measured
    path = tmp_path / "thresholds.json"
    path.write_text(json.dumps(file))
    assert judge(measured, Thresholds.default("int8").changed(read_thresholds(path)["int8"]["t2i"])) == []
    # half as much again of the error is beyond them
    assert judge(metrics_of((step(sqnr=22.2),), ssim=0.9), Thresholds(limits))


def test_a_suggestion_that_allows_more_than_the_default_is_said() -> None:
    check = TaskCheck(metrics_of((step(sqnr=20.0),)), Thresholds.default("int8"), 1, ())
    noise, ratio = laxer_than_defaults(suggest({"t2i": check}, "int8"))
    assert noise.startswith("t2i: sqnr_db 14 asks for less than the default 17") and "pooled_guidance_ratio" in ratio


def test_no_suggestion_is_stricter_than_rounding_or_without_meaning() -> None:
    table = {metric.name: metric for metric in METRICS}
    perfect = metrics_of((StepMetrics(1.0, 200.0, 1.0, 0.0, 0.0, ()),))
    assert suggested(table["sqnr_db"], perfect) == 60.0  # fp32's own default: the order of sums
    assert suggested(table["cosine"], perfect) == 0.99999
    assert suggested(table["guidance_ratio"], perfect) is None  # no guidance
    lost = metrics_of((step(ratio=0.5),))
    assert suggested(table["guidance_ratio"], lost) is None  # three times the distance is nothing
    assert suggested(table["colour_difference"], lost) is None  # never judged
    assert suggested(table["sqnr_db"], TaskMetrics(())) is None
