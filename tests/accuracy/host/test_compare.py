"""Every guard and every metric has a seeded defect that it must see."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mtu_compile.accuracy.host.compare import check_comparable, compare_recorded, compare_runs
from mtu_compile.accuracy.metrics import (
    cosine,
    guidance_metrics,
    image_metrics,
    pool_guidance,
    psnr_db,
    sqnr_db,
    step_metrics,
)
from mtu_compile.accuracy.task_metrics import TaskMetrics
from mtu_compile.accuracy.thresholds import Failure, Thresholds, in_words, judge, require_accuracy
from mtu_compile.core.errors import AccuracyError

Outputs = dict[str, np.ndarray]
TIMESTEPS = (900, 500, 100)


def unet(feed: Outputs) -> Outputs:
    """A stand-in for the float reference: depends on the sample and on the timestep."""
    return {"out_sample": np.tanh(feed["sample"][:, :4]) * (0.5 + feed["timestep"][0] / 1000)}


def make_runner(function: Callable[[Outputs], Outputs], *, inputs: dict[str, tuple[Any, ...]] | None = None) -> Any:
    """A Polygraphy runner over a Python function."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

    shapes = inputs or {"sample": (2, 4, 8, 8), "timestep": (1,)}

    class FunctionRunner(BaseRunner):
        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for name, shape in shapes.items():
                metadata.add(name, dtype=np.dtype(np.float32), shape=shape)
            return metadata

        def infer_impl(self, feed_dict: Outputs) -> Outputs:
            self.inference_time = 0.0
            return function(feed_dict)

    return FunctionRunner(name="candidate")


def make_results(*runs: list[Outputs]) -> Any:
    from polygraphy.comparator import RunResults

    results = RunResults()
    for index, outputs in enumerate(runs):
        results.add(outputs, runner_name="reference" if not index else f"candidate-{index}")
    return results


@pytest.fixture
def recording() -> tuple[list[Outputs], list[Outputs]]:
    rng = np.random.default_rng(0)
    feeds = [
        {"sample": rng.standard_normal((2, 4, 8, 8), dtype=np.float32), "timestep": np.array([t], np.float32)}
        for t in TIMESTEPS
    ]
    return feeds, [unet(feed) for feed in feeds]


#: Metrics of pictures that have no say here.
PERFECT = {
    "latent_psnr_db": 60.0,
    "image_psnr_db": 60.0,
    "ssim": 1.0,
    "vif": 1.0,
    "inside_psnr_db": 60.0,
    "outside_psnr_db": 60.0,
    "truth_drop_db": 0.0,
}


def metrics_of(steps: tuple[Any, ...], **pictures: float) -> TaskMetrics:
    return TaskMetrics(steps, **{**PERFECT, **pictures})


def test_an_equal_candidate_passes_everything(recording, capsys):
    feeds, reference = recording
    steps = compare_recorded(make_runner(unet), feeds, reference, guidance="text")
    assert [step.timestep for step in steps] == list(TIMESTEPS)
    assert all((s.sqnr_db, s.cosine, s.max_abs, s.max_rel) == (200.0, pytest.approx(1), 0, 0) for s in steps)
    for precision in ("int8", "bf16", "fp32"):
        assert judge(metrics_of(steps), Thresholds.default(precision)) == []
    assert capsys.readouterr().out == ""


# What a candidate can do wrong that is refused before any metric.
DEFECTS: dict[str, tuple[Callable[[Outputs], Outputs], str]] = {
    "dropped output": (lambda feed: {}, "no output 'out_sample'"),
    "renamed output": (lambda feed: {"renamed": unet(feed)["out_sample"]}, "no output 'out_sample'"),
    "extra output": (lambda feed: {**unet(feed), "more": np.ones(1)}, "output 'more' that reference has not"),
    "NaN": (lambda feed: {"out_sample": unet(feed)["out_sample"] * np.nan}, "NaN or Inf"),
    "Inf": (lambda feed: {"out_sample": unet(feed)["out_sample"] + np.inf}, "NaN or Inf"),
    "other shape": (lambda feed: {"out_sample": unet(feed)["out_sample"][:1]}, "has shape"),
    "empty output": (lambda feed: {"out_sample": unet(feed)["out_sample"][:0]}, "has shape"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_outputs_that_cannot_be_compared_are_refused(recording, defect):
    function, message = DEFECTS[defect]
    with pytest.raises(AccuracyError, match=message) as caught:
        compare_recorded(make_runner(function), *recording)
    assert caught.value.exit_code == 3


def test_a_dropped_output_among_several_is_refused(recording):
    feeds, reference = recording
    both = [{**outputs, "second": np.ones(3)} for outputs in reference]
    with pytest.raises(AccuracyError, match="no output 'second'"):
        compare_recorded(make_runner(unet), feeds, both)


def test_zero_iterations_are_refused():
    with pytest.raises(AccuracyError, match="zero iterations"):
        compare_recorded(make_runner(unet), [], [])
    with pytest.raises(AccuracyError, match="zero iterations"):
        check_comparable(make_results([{"y": np.ones(1)}], []))


def test_unequal_iteration_counts_are_refused(recording):
    feeds, reference = recording
    with pytest.raises(AccuracyError, match="candidate ran 2 iterations, reference 3"):
        compare_recorded(make_runner(unet), feeds[:2], reference)
    with pytest.raises(AccuracyError, match="2 timesteps were given for 3"):
        compare_recorded(make_runner(unet), feeds, reference, timesteps=[1, 2])


def test_a_single_runner_is_no_comparison():
    with pytest.raises(AccuracyError, match="nothing to compare"):
        check_comparable(make_results([{"y": np.ones(1)}]))


def test_a_broken_reference_is_refused_too(recording):
    feeds, reference = recording
    reference[1] = {"out_sample": reference[1]["out_sample"] * np.nan}
    with pytest.raises(AccuracyError, match=r"reference: output 'out_sample' has .* NaN"):
        compare_recorded(make_runner(unet), feeds, reference)
    with pytest.raises(AccuracyError, match="no outputs"):
        check_comparable(make_results([{}], [{}]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"latents": (2, 4, 8, 8), "timestep": (1,)}, "candidate has an input 'latents'"),
        ({"sample": (2, 4, 8, 8)}, "recording has an input 'timestep'"),
        ({"sample": (2, 4, 16, 4), "timestep": (1,)}, r"input 'sample': shape"),
        ({"sample": (2, 256), "timestep": (1,)}, r"input 'sample': shape"),
    ],
)
def test_inputs_are_matched_exactly(recording, inputs, message):
    """Polygraphy alone would feed the input at the same position, reshaped."""
    with pytest.raises(AccuracyError, match=message):
        compare_recorded(make_runner(unet, inputs=inputs), *recording)


def test_dynamic_inputs_take_the_recorded_shape(recording):
    runner = make_runner(unet, inputs={"sample": (None, 4, None, None), "timestep": (1,)})
    assert len(compare_recorded(runner, *recording)) == 3


def test_a_wrong_scale_fails_although_the_cosine_is_perfect(recording):
    feeds, reference = recording
    runner = make_runner(lambda feed: {"out_sample": 1.5 * unet(feed)["out_sample"]})
    steps = compare_recorded(runner, feeds, reference)
    assert steps[0].cosine == pytest.approx(1)
    assert steps[0].sqnr_db == pytest.approx(20 * math.log10(2), abs=1e-3)
    failures = judge(metrics_of(steps), Thresholds.default("int8"))
    assert [(f.metric, f.timestep) for f in failures] == [("sqnr_db", t) for t in TIMESTEPS]
    assert all(f.threshold == Thresholds.default("int8").sqnr_db for f in failures)


def test_a_swapped_task_fails(recording):
    """Another task's engine takes the same inputs and computes another function of them."""
    feeds, reference = recording
    runner = make_runner(lambda feed: {"out_sample": np.sin(3 * feed["sample"])[:, ::-1]})
    failures = judge(metrics_of(compare_recorded(runner, feeds, reference)), Thresholds.default("int8"))
    assert {"sqnr_db", "cosine"} <= {failure.metric for failure in failures}
    message = r"'edit' is less accurate.*: sqnr_db below 17 at 3 of 3 calls, worst -?\d[^;]* at timestep \d+; cosine"
    with pytest.raises(AccuracyError, match=message) as caught:
        require_accuracy("edit", metrics_of(compare_recorded(runner, feeds, reference)), Thresholds.default("int8"))
    assert caught.value.exit_code == 3 and caught.value.hint


def test_one_bad_timestep_is_enough(recording):
    feeds, reference = recording

    def late(feed: Outputs) -> Outputs:
        noise = 0.5 if feed["timestep"][0] == 500 else 0.0
        return {"out_sample": unet(feed)["out_sample"] + np.float32(noise)}

    failures = judge(metrics_of(compare_recorded(make_runner(late), feeds, reference)), Thresholds.default("bf16"))
    assert {failure.timestep for failure in failures} == {500}


def test_a_candidate_that_raises_is_an_accuracy_error(recording):
    from polygraphy.logger import G_LOGGER

    def broken(feed: Outputs) -> Outputs:
        G_LOGGER.critical("device lost")
        raise AssertionError

    with pytest.raises(AccuracyError, match="cannot run the recorded inputs: device lost"):
        compare_recorded(make_runner(broken), *recording)


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


def test_pooled_guidance_weighs_each_call_by_its_size():
    """A delta of norm 4 that is kept, and one of norm 3 that is lost: √(16 / 25) is left, with 9 / 25 as noise."""

    def step(norm: float, kept: float, timestep: float) -> Any:
        shared, delta = np.zeros((1, 1, 1, 1)), np.full((1, 1, 1, 1), norm)
        want, have = (np.concatenate([shared, part]) for part in (delta, kept * delta))
        return step_metrics({"out_sample": want}, {"out_sample": have}, timestep=timestep, guidance="text")

    steps = (step(4, 1, 900), step(3, 0, 500))
    text = pool_guidance(steps)["text"]
    assert text.ratio == pytest.approx(0.8) and text.sqnr_db == pytest.approx(10 * math.log10(25 / 9))
    assert (text.worst_ratio, text.cosine) == (0, 0)
    asked = Thresholds(*[None] * 7, pooled_guidance_ratio=0.85, guidance_sqnr_db=5.0)
    failures = judge(metrics_of(steps), asked)
    assert [str(failure) for failure in failures] == [
        "text_pooled_guidance_ratio 0.8, threshold 0.85",
        "text_guidance_sqnr_db 4.437, threshold 5",
    ]
    assert judge(metrics_of(steps[:1]), asked) == []
    (grown,) = judge(metrics_of((step(1, 1.5, 900),)), Thresholds(*[None] * 7, pooled_guidance_ratio=0.85))
    assert grown.above and grown.threshold == pytest.approx(1 / 0.85) and grown.value == pytest.approx(1.5)
    # Twice as much and half as much are equally far from 1.
    assert pool_guidance((step(1, 2.1, 1), step(1, 0.5, 2)))["text"].worst_ratio == pytest.approx(2.1)
    assert pool_guidance((step(1, 1.9, 1), step(1, 0.5, 2)))["text"].worst_ratio == pytest.approx(0.5)
    assert pool_guidance(()) == {}


def test_failures_of_many_calls_are_one_phrase(recording):
    feeds, reference = recording

    def noisy(feed: Outputs) -> Outputs:
        output = unet(feed)["out_sample"]
        share = {900: 0.5, 500: 0.3, 100: 0.0}[float(feed["timestep"][0])]
        return {"out_sample": (1 + share) * output}

    metrics = metrics_of(compare_recorded(make_runner(noisy), feeds, reference), ssim=0.5)
    phrases = in_words(judge(metrics, Thresholds.default("int8")), len(metrics.steps))
    assert phrases == ("sqnr_db below 17 at 2 of 3 calls, worst 6.021 at timestep 900", "ssim 0.5, threshold 0.9")
    nan = Failure("sqnr_db", math.nan, 12, 500, call=1)
    assert in_words([Failure("sqnr_db", 3.0, 12, 900, call=0), nan], 3)[0].endswith("worst nan at timestep 500")
    above = [Failure("text_guidance_ratio", v, 1.667, t, True, c) for c, (v, t) in enumerate([(2, 900), (3, 500)])]
    assert in_words(above, 3) == ("text_guidance_ratio above 1.667 at 2 of 3 calls, worst 3 at timestep 500",)


def test_guidance_directions_of_three_samples():
    none, image, full = (np.full((1, 4, 8, 8), value) for value in (0.0, 1.0, 3.0))
    reference = np.concatenate([none, image, full])
    candidate = np.concatenate([none, 2 * image, full])
    deltas = guidance_metrics(reference, candidate, "text+image")
    assert [(d.direction, d.ratio) for d in deltas] == [("image", pytest.approx(2)), ("text", pytest.approx(0.5))]
    assert guidance_metrics(reference, candidate, "none") == ()
    with pytest.raises(AccuracyError, match="2 samples a picture"):
        guidance_metrics(reference, candidate, "text")


def test_signal_to_noise_and_cosine_are_their_definitions():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal(10_000)
    noise = rng.standard_normal(10_000)
    noise *= 0.1 * np.linalg.norm(signal) / np.linalg.norm(noise)
    assert sqnr_db(signal, signal + noise) == pytest.approx(20)
    assert sqnr_db(signal, signal) == 200
    assert sqnr_db(np.zeros(3), np.ones(3)) == -200
    assert cosine(signal, -2 * signal) == pytest.approx(-1)
    assert cosine(np.zeros(3), np.zeros(3)) == 1
    assert cosine(np.zeros(3), np.ones(3)) == 0
    assert psnr_db(np.array([0.0, 4.0]), np.array([0.4, 4.4])) == pytest.approx(20)
    assert psnr_db(np.zeros(4), np.full(4, 0.1), peak=1.0) == pytest.approx(20)
    for bad in (np.ones(4), np.array([1.0, np.nan, 1.0])):
        with pytest.raises(AccuracyError):
            sqnr_db(np.ones(3), bad)


def test_pictures():
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    assert image_metrics(picture, picture) == (200.0, pytest.approx(1))
    assert image_metrics(picture, picture.astype(np.float32) / 255)[0] > 100
    noisy = np.clip(picture / 255 + 0.2 * rng.standard_normal(picture.shape), 0, 1)
    psnr, ssim = image_metrics(picture, noisy)
    assert 10 < psnr < 20 and ssim < 0.8
    failures = judge(metrics_of((), image_psnr_db=psnr, ssim=ssim), Thresholds.default("int8"))
    assert {"image_psnr_db", "ssim"} <= {failure.metric for failure in failures}
    for bad in (picture[:8], picture[..., 0], picture.astype(np.float32), np.full((16, 16, 3), np.nan)):
        with pytest.raises(AccuracyError):
            image_metrics(bad, bad)


def test_what_was_not_measured_fails_its_threshold():
    failures = judge(TaskMetrics(()), Thresholds.default("int8"))
    pictures = ["latent_psnr_db", "image_psnr_db", "ssim", "vif", "inside_psnr_db", "outside_psnr_db", "truth_drop_db"]
    assert [f.metric for f in failures] == ["sqnr_db", "cosine", *pictures]
    assert str(failures[0]) == "sqnr_db not measured, threshold 17"
    assert judge(TaskMetrics(()), Thresholds(None, None, None, None, None, None, None)) == []
    nan = judge(TaskMetrics((), ssim=math.nan), Thresholds(None, None, None, None, None, None, 0.5))
    assert [f.metric for f in nan] == ["ssim"]
    drop = Thresholds(*[None] * 7, truth_drop_db=1.0)
    assert judge(TaskMetrics((), truth_drop_db=-3.0), drop) == []
    for value in (1.5, math.nan):
        (failure,) = judge(TaskMetrics((), truth_drop_db=value), drop)
        assert failure.metric == "truth_drop_db" and failure.above
    without = Thresholds.default("int8").without(["ssim", "vif", "clip"])
    assert without.ssim is None and without.vif is None and without.cosine == Thresholds.default("int8").cosine


def test_thresholds_are_known_for_every_precision_and_no_other():
    anything = Thresholds.default("int8", "a task of one's own")
    assert anything == Thresholds.default("int8")
    for name, least in vars(anything).items():  # a task's own row asks for more
        wanted = getattr(Thresholds.default("int8", "edit"), name)
        assert wanted < least if name == "truth_drop_db" else wanted > least, name
    with pytest.raises(AccuracyError, match="int3"):
        Thresholds.default("int3")
    order = [Thresholds.default(precision) for precision in ("int8", "bf16", "fp16", "fp32")]
    for looser, tighter in itertools.pairwise(order):
        for name, loose in vars(looser).items():
            tight = getattr(tighter, name)
            assert tight < loose if name == "truth_drop_db" else loose < tight, name


def test_metrics_are_written_as_strict_json(recording):
    feeds, reference = recording
    steps = compare_recorded(make_runner(unet), feeds, reference, guidance="text")
    written = json.loads(json.dumps(metrics_of(steps).to_json(), allow_nan=False))
    assert written["steps"][0]["guidance"][0]["direction"] == "text"
    assert written["ssim"] == 1.0


class TestPolygraphysOwnComparison:
    """``compare_runs``: Comparator.compare_accuracy behind the guards."""

    signal = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)

    def test_equal_runs_pass(self, capsys):
        compare_runs(make_results([{"y": self.signal}], [{"y": self.signal}]), sqnr_db=60, cosine=0.999)
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("run", "message"),
        [
            ([{"z": signal}], "no output 'y'"),
            ([{"y": signal, "z": signal}], "output 'z'"),
            ([], "zero iterations"),
            ([{"y": signal * np.nan}], "NaN"),
            ([{"y": signal * 1.5}], "sqnr_db 6.02.* threshold 20"),
            ([{"y": signal[::-1].copy()}], "threshold 20"),
        ],
    )
    def test_defects_fail(self, run, message):
        with pytest.raises(AccuracyError, match=message):
            compare_runs(make_results([{"y": self.signal}], run), sqnr_db=20, cosine=0.9)

    def test_the_cosine_is_judged(self):
        with pytest.raises(AccuracyError, match=r"cosine -?0\..* threshold 0.9"):
            compare_runs(make_results([{"y": self.signal}], [{"y": self.signal[::-1].copy()}]), sqnr_db=-99, cosine=0.9)
