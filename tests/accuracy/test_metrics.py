"""The table of metrics: an entry is all it takes, and every entry says what it has to."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtu_compile.accuracy import metrics
from mtu_compile.accuracy.formulas import psnr_db
from mtu_compile.accuracy.measuring import measure_picture
from mtu_compile.accuracy.metric import Figure, Metric, Subject, by_precision
from mtu_compile.accuracy.metrics import METRICS, judged
from mtu_compile.accuracy.pictures import Perceptual
from mtu_compile.accuracy.readings import PerCall, PerPicture
from mtu_compile.accuracy.summary import absent_reasons, columns, figure_of, summarise
from mtu_compile.accuracy.task_metrics import TaskMetrics
from mtu_compile.accuracy.threshold_file import suggest
from mtu_compile.accuracy.thresholds import Thresholds, judge
from mtu_compile.accuracy.verdict import CheckResult, TaskCheck
from mtu_compile.bundle.accuracy import Accuracy
from mtu_compile.cli.check import print_accuracy
from mtu_compile.core.schema import Mismatch, conform
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.report.metrics import metric_lines
from mtu_compile.runtime import Result
from mtu_compile.runtime.reference import Trajectory

T2I, EDIT, SR, INPAINT = PAPER_TASKS


def picture_of(level: int) -> Image.Image:
    return Image.fromarray(np.full((16, 16, 3), level, np.uint8))


def pair(level: int) -> tuple[Trajectory, Result]:
    """A grey picture of the float original, and one that is ``level`` levels lighter."""
    latents = np.arange(256, dtype=np.float32).reshape(1, 4, 8, 8)
    outputs = np.zeros((1, 1, 4, 8, 8), np.float32)
    step = {"timestep": np.array([500], np.float32)}
    original = Trajectory("a cat", 0, None, None, [step], outputs, latents, latents, picture_of(100))
    return original, Result(picture_of(100 + level), latents)


def rows(picture: Any) -> Any:
    return np.asarray(picture).mean(axis=1) / 255


#: PSNR of the mean colour of each row: made up, and nowhere else in this repository.
ROW_PSNR = Metric(
    "row_psnr_db",
    "more",
    PerPicture(lambda trajectory, candidate, _: psnr_db(rows(trajectory.picture), rows(candidate.image), peak=1.0)),
    (Figure("row_psnr_db", "rows, PSNR", column="rows\ndB"),),
    lambda subject, worst: "does not apply: no rows" if subject.task.name == "sr" else None,
    by_precision(int8=30.0, int4_weights=20.0, bf16=35.0, fp16=40.0, fp32=60.0),
)


@pytest.fixture
def with_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", (*METRICS, ROW_PSNR))


@pytest.mark.usefixtures("with_rows")
def test_a_metric_is_one_entry(capsys: pytest.CaptureFixture[str]) -> None:
    """Measured, summed up, judged, kept in the manifest with a type, shown, and a threshold of it is suggested."""
    measured = TaskMetrics((), (measure_picture(*pair(51), T2I, Perceptual()),))  # 51 of 255: 14 dB
    thresholds = Thresholds.default("int8").without(set(Thresholds.default("int8").limits) - {"row_psnr_db"})
    failures = judge(measured, thresholds)
    assert [failure.metric for failure in failures] == ["row_psnr_db"] and failures[0].threshold == 30.0
    check = TaskCheck(measured, thresholds, 1, tuple(map(str, failures)))
    summary = {**check.summary(), "measured_with": "a test", "worst_sqnr_db": 30.0}
    assert summary["row_psnr_db"] == pytest.approx(20 * np.log10(5)) and summary["thresholds"]["row_psnr_db"] == 30.0
    assert summary["mean_sqnr_db"] is None  # no calls here: a check has some
    del summary["mean_sqnr_db"], summary["worst_cosine"]
    conform(Accuracy, summary)
    for changed in ({"row_psnr_db": "14"}, {"row_psnr_db": 1e9}, {"thresholds": {"row_psnr_db": [30.0]}}):
        with pytest.raises(Mismatch, match="row_psnr_db"):
            conform(Accuracy, {**summary, **changed})
    line = {one.key: one for one in metric_lines(summary, {"row_psnr_db": 15.0}, thresholds)}["row_psnr_db"]
    assert (line.label, line.unit, line.recorded) == ("rows, PSNR", "dB", 15.0)
    assert line.bounds == (30.0, None) and line.passed is False
    fine = replace(check, metrics=TaskMetrics((), (measure_picture(*pair(1), T2I, Perceptual()),)))
    assert suggest({"t2i": fine}, "int8")["thresholds"]["int8"]["t2i"] == {"row_psnr_db": 42.1}  # 48.13 less 6
    print_accuracy(CheckResult({"t2i": fine}, "a test", "int8"), quiet=False)
    shown = capsys.readouterr().out
    assert "rows" in shown and "48.1" in shown
    assert absent_reasons(Subject(SR, measured, Perceptual(), False))[0]["row_psnr_db"] == "does not apply: no rows"


def test_an_entry_has_a_unit_and_if_it_is_judged_a_margin() -> None:
    with pytest.raises(ValueError, match="unit"):
        replace(ROW_PSNR, name="sharpness")
    with pytest.raises(ValueError, match="margin"):
        replace(ROW_PSNR, name="row_difference")


def test_each_figure_has_one_place_and_is_found_there() -> None:
    places = [place for metric in METRICS for figure in metric.figures for place in figure.places()]
    assert len(set(places)) == len(places)
    for metric in METRICS:
        for figure in metric.figures:
            assert all(figure_of(place) == (metric, figure) for place in figure.places())
    assert figure_of("guidance.text") is None and figure_of("guidance.text.more.ratio") is None
    assert len({metric.name for metric in METRICS}) == len(METRICS) and len(judged()) == 13
    assert list(columns())[:2] == ["UNet SQNR dB\nworst / mean", "deltas left\ntext / image"]


def test_where_a_metric_does_not_apply_it_says_why_and_is_not_judged() -> None:
    nothing = TaskMetrics(())
    reasons, absent = absent_reasons(Subject(SR, nothing, Perceptual(), True))
    assert "no guidance" in reasons["guidance"] and "no guidance" in reasons["guidance_ratio"]
    assert {"guidance_ratio", "guidance_cosine", "pooled_guidance_ratio", "guidance_sqnr_db", "vif"} <= absent
    assert "torch" in reasons["vif"] and "whole picture" in reasons["outside_psnr_db"] and "truth_drop_db" not in absent
    reasons, absent = absent_reasons(Subject(T2I, nothing, Perceptual(), True))
    assert "guidance" not in reasons and "no single right answer" in reasons["truth_drop_db"]
    assert summarise(nothing)["guidance"] is None and summarise(nothing)["guidance_ratio"] is None


def test_nothing_that_is_worse_passes() -> None:
    """A metric's worst value, bounds and verdict agree on the direction."""
    for metric in judged():
        threshold = (metric.defaults or {})["int8"]
        low, high = metric.bounds(threshold)
        for limit in (low, high):
            if limit is not None:
                assert metric.missed(limit, threshold) is None
        beyond = [low * 0.9 if low is not None else None, high * 1.1 if high is not None else None]
        for value in (one for one in beyond if one is not None):
            assert metric.missed(value, threshold) is not None
            assert metric.worst_of([value, low if low is not None and value < low else high]) == value
        assert metric.missed(float("nan"), threshold) is not None and metric.missed(None, threshold) is not None


def test_calls_are_read_where_they_were_made() -> None:
    draw = PerCall(lambda call: call.sqnr_db)
    assert [asdict(one) for one in draw(TaskMetrics(()), "sqnr_db")] == [
        {"value": None, "direction": None, "timestep": None, "call": None}
    ]
