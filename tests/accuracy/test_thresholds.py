"""Thresholds and the verdict: each metric has a seeded defect that it must see."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from mtu_compile.accuracy.calls import step_metrics
from mtu_compile.accuracy.metrics import judged
from mtu_compile.accuracy.task_metrics import PictureMetrics, TaskMetrics
from mtu_compile.accuracy.threshold_file import read_thresholds
from mtu_compile.accuracy.thresholds import Failure, Thresholds, judge
from mtu_compile.core.errors import AccuracyError, BundleError
from mtu_compile.core.precision import Precision
from tests.accuracy.measured import metrics_of

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji" / "model" / "thresholds.json"


def test_a_collapsed_guidance_delta_fails_although_the_output_is_close():
    rng = np.random.default_rng(3)
    shared = rng.standard_normal((1, 4, 8, 8))
    delta = 0.02 * rng.standard_normal((1, 4, 8, 8))
    reference = {"out_sample": np.concatenate([shared, shared + delta])}
    candidate = {"out_sample": np.concatenate([shared, shared + 0.05 * delta])}
    step = step_metrics(reference, candidate, timestep=500, guidance="text")
    assert step.sqnr_db > 30 and step.cosine > 0.999
    (text,) = step.guidance
    assert (text.direction, text.ratio) == ("text", pytest.approx(0.05))
    failures = judge(metrics_of((step,)), Thresholds.default("int8"))
    assert failures[0] == Failure("text_guidance_ratio", text.ratio, 0.7, 500, call=0)
    assert str(failures[0]) == "text_guidance_ratio 0.05 at timestep 500, threshold 0.7"
    assert [failure.metric for failure in failures[1:]] == ["text_pooled_guidance_ratio", "text_guidance_sqnr_db"]
    for changed, metric, value, threshold in (
        (3 * delta, "text_guidance_ratio", 3, 1 / 0.7),
        (-delta, "text_guidance_cosine", -1, 0.7),
    ):
        defect = {"out_sample": np.concatenate([shared, shared + changed])}
        step = step_metrics(reference, defect, timestep=500, guidance="text")
        failure = judge(metrics_of((step,)), Thresholds.default("int8"))[0]
        assert (failure.metric, failure.value, failure.above) == (metric, pytest.approx(value), value > 1)
        assert failure.threshold == pytest.approx(threshold)


def test_what_was_not_measured_fails_its_threshold():
    failures = judge(TaskMetrics(()), Thresholds.default("int8"))
    pictures = ["latent_psnr_db", "image_psnr_db", "ssim", "vif", "inside_psnr_db", "outside_psnr_db", "truth_drop_db"]
    assert [f.metric for f in failures] == ["sqnr_db", "cosine", *pictures]
    assert str(failures[0]) == "sqnr_db not measured, threshold 17"
    assert judge(TaskMetrics(()), Thresholds({})) == []
    nan = judge(TaskMetrics((), (PictureMetrics({"ssim": math.nan}),)), Thresholds({"ssim": 0.5}))
    assert [f.metric for f in nan] == ["ssim"]
    drop = Thresholds({"truth_drop_db": 1.0})
    assert judge(TaskMetrics((), (PictureMetrics({"truth_drop_db": -3.0}),)), drop) == []
    for value in (1.5, math.nan):
        (failure,) = judge(TaskMetrics((), (PictureMetrics({"truth_drop_db": value}),)), drop)
        assert failure.metric == "truth_drop_db" and failure.above
    without = Thresholds.default("int8").without(["ssim", "vif", "clip"])
    assert without["ssim"] is None and without["vif"] is None
    assert without["cosine"] == Thresholds.default("int8")["cosine"]


def test_thresholds_are_known_for_every_precision_and_no_other():
    names = {metric.name for metric in judged()}
    assert all(Thresholds.default(precision).limits.keys() == names for precision in get_args(Precision))
    with pytest.raises(AccuracyError, match="int3"):
        Thresholds.default("int3")
    order = [Thresholds.default(precision) for precision in ("int8", "bf16", "fp16", "fp32")]
    for looser, tighter in itertools.pairwise(order):
        for name, loose in looser.limits.items():
            tight = tighter.limits[name]
            assert tight < loose if name == "truth_drop_db" else loose < tight, name


def test_the_example_asks_for_no_less_than_the_defaults_and_mostly_for_more():
    defaults = Thresholds.default("int8").limits
    rows = read_thresholds(EXAMPLE)["int8"]
    assert list(rows) == ["t2i", "edit", "sr", "inpaint"]
    assert rows["edit"].keys() == defaults.keys()
    for task, row in rows.items():
        stricter = 0
        for name, wanted in row.items():
            least = defaults[name]
            assert wanted is not None
            assert wanted <= least if name == "truth_drop_db" else wanted >= least, (task, name)
            stricter += wanted != least
        assert stricter >= len(row) - 2, task


def test_a_bundle_is_judged_by_its_own_and_else_by_the_defaults():
    own = Thresholds.of_bundle("int8", {"ssim": 0.97, "vif": None})
    assert own["ssim"] == 0.97 and own["vif"] is None and own["sqnr_db"] == Thresholds.default("int8")["sqnr_db"]
    assert Thresholds.of_bundle("int8", None) == Thresholds.of_bundle("int8", {}) == Thresholds.default("int8")
    with pytest.raises(BundleError, match="sharpness_db"):
        Thresholds.of_bundle("int8", {"sharpness_db": 3.0})
    calls = own.of_calls()
    assert set(calls.limits) == {"sqnr_db", "cosine", "guidance_ratio", "guidance_cosine"}
