"""Recorded calls are compared in one way, whether Polygraphy runs the candidate or an engine alone, as on a board.

Every guard has a seeded defect that it must see.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mtu_compile.accuracy.host.compare import compare_runner
from mtu_compile.accuracy.recorded import RecordedCall, compare_recorded
from mtu_compile.accuracy.thresholds import Failure, Thresholds, in_words, judge
from mtu_compile.accuracy.verdict import TaskCheck
from mtu_compile.core.errors import AccuracyError
from mtu_compile.runtime.engine import TensorSpec
from tests.accuracy.measured import metrics_of
from tests.recording import recorded_calls

Outputs = dict[str, np.ndarray]
TIMESTEPS = (900, 500, 100)
SHAPES: dict[str, tuple[Any, ...]] = {"sample": (2, 4, 8, 8), "timestep": (1,)}


def unet(feed: Outputs) -> Outputs:
    """A stand-in for the float reference: depends on the sample and on the timestep."""
    return {"out_sample": np.tanh(feed["sample"][:, :4]) * (0.5 + feed["timestep"][0] / 1000)}


class Alone:
    """A candidate that is a Python function, as an engine is called on a board."""

    def __init__(self, function: Callable[[Outputs], Outputs], shapes: dict[str, tuple[Any, ...]]) -> None:
        self._function = function
        self.inputs = {name: TensorSpec(name, shape, np.dtype(np.float32)) for name, shape in shapes.items()}

    def __call__(self, inputs: Any) -> Outputs:
        return self._function(inputs)


def make_runner(function: Callable[[Outputs], Outputs], shapes: dict[str, tuple[Any, ...]]) -> Any:
    """A Polygraphy runner over a Python function."""
    from polygraphy.backend.base import BaseRunner
    from polygraphy.common import TensorMetadata

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


Compare = Callable[..., Any]


@pytest.fixture(params=["polygraphy", "engine alone"])
def compare(request: pytest.FixtureRequest) -> Compare:
    """A function, of the recording and, if other than the UNet's, the shapes it takes, compared in one of both ways."""

    def run(function: Any, calls: Any, *, shapes: Any = SHAPES, guidance: Any = "none") -> Any:
        if request.param == "polygraphy":
            return compare_runner(make_runner(function, shapes), calls, guidance=guidance)
        return compare_recorded(Alone(function, shapes), calls, guidance=guidance)

    return run


@pytest.fixture
def recording() -> list[RecordedCall]:
    rng = np.random.default_rng(0)
    feeds = [
        {"sample": rng.standard_normal((2, 4, 8, 8), dtype=np.float32), "timestep": np.array([t], np.float32)}
        for t in TIMESTEPS
    ]
    return recorded_calls(feeds, [unet(feed) for feed in feeds])


def test_an_equal_candidate_passes_everything(recording, compare, capsys):
    steps = compare(unet, recording, guidance="text")
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
def test_outputs_that_cannot_be_compared_are_refused(recording, compare, defect):
    function, message = DEFECTS[defect]
    with pytest.raises(AccuracyError, match=message) as caught:
        compare(function, recording)
    assert caught.value.exit_code == 3


def test_a_dropped_output_among_several_is_refused(recording, compare):
    both = [RecordedCall(one.inputs, {**one.outputs, "second": np.ones(3)}, one.timestep) for one in recording]
    with pytest.raises(AccuracyError, match="no output 'second'"):
        compare(unet, both)


def test_zero_iterations_are_refused(compare):
    with pytest.raises(AccuracyError, match="zero iterations"):
        compare(unet, [])


def test_a_broken_reference_is_refused_too(recording, compare):
    first = recording[1]
    recording[1] = RecordedCall(first.inputs, {"out_sample": first.outputs["out_sample"] * np.nan}, first.timestep)
    with pytest.raises(AccuracyError, match=r"reference: output 'out_sample' has .* NaN"):
        compare(unet, recording)
    recording[1] = RecordedCall(first.inputs, {}, first.timestep)
    with pytest.raises(AccuracyError, match="no outputs"):
        compare(lambda feed: {}, recording[1:])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"latents": (2, 4, 8, 8), "timestep": (1,)}, "candidate has an input 'latents'"),
        ({"sample": (2, 4, 8, 8)}, "recording has an input 'timestep'"),
        ({"sample": (2, 4, 16, 4), "timestep": (1,)}, r"input 'sample': shape"),
        ({"sample": (2, 256), "timestep": (1,)}, r"input 'sample': shape"),
    ],
)
def test_inputs_are_matched_exactly(recording, compare, shapes, message):
    """Polygraphy alone would feed the input at the same position, reshaped."""
    with pytest.raises(AccuracyError, match=message):
        compare(unet, recording, shapes=shapes)


def test_dynamic_inputs_take_the_recorded_shape(recording, compare):
    assert len(compare(unet, recording, shapes={"sample": (None, 4, None, None), "timestep": (1,)})) == 3


def test_a_wrong_scale_fails_although_the_cosine_is_perfect(recording, compare):
    steps = compare(lambda feed: {"out_sample": 1.5 * unet(feed)["out_sample"]}, recording)
    assert steps[0].cosine == pytest.approx(1)
    assert steps[0].sqnr_db == pytest.approx(20 * math.log10(2), abs=1e-3)
    failures = judge(metrics_of(steps), Thresholds.default("int8"))
    assert [(f.metric, f.timestep) for f in failures] == [("sqnr_db", t) for t in TIMESTEPS]
    assert all(f.threshold == Thresholds.default("int8")["sqnr_db"] for f in failures)


def test_a_swapped_task_fails(recording, compare):
    """Another task's engine takes the same inputs and computes another function of them."""
    steps = compare(lambda feed: {"out_sample": np.sin(3 * feed["sample"])[:, ::-1]}, recording)
    failures = judge(metrics_of(steps), Thresholds.default("int8"))
    assert {"sqnr_db", "cosine"} <= {failure.metric for failure in failures}
    noise, angle = in_words(failures, len(steps))
    assert re.fullmatch(r"sqnr_db below 17 at 3 of 3 calls, worst -?\d\S* at timestep \d+", noise)
    assert angle.startswith("cosine below 0.98 at 3 of 3 calls")


def test_one_bad_timestep_is_enough(recording, compare):
    def late(feed: Outputs) -> Outputs:
        noise = 0.5 if feed["timestep"][0] == 500 else 0.0
        return {"out_sample": unet(feed)["out_sample"] + np.float32(noise)}

    failures = judge(metrics_of(compare(late, recording)), Thresholds.default("bf16"))
    assert {failure.timestep for failure in failures} == {500}


def test_a_candidate_that_raises_is_an_accuracy_error(recording):
    from polygraphy.logger import G_LOGGER

    def broken(feed: Outputs) -> Outputs:
        G_LOGGER.critical("device lost")
        raise AssertionError

    with pytest.raises(AccuracyError, match="cannot run the recorded inputs: device lost"):
        compare_runner(make_runner(broken, SHAPES), recording)


def test_failures_of_many_calls_are_one_phrase(recording, compare):
    def noisy(feed: Outputs) -> Outputs:
        output = unet(feed)["out_sample"]
        share = {900: 0.5, 500: 0.3, 100: 0.0}[float(feed["timestep"][0])]
        return {"out_sample": (1 + share) * output}

    metrics = metrics_of(compare(noisy, recording), ssim=0.5)
    phrases = in_words(judge(metrics, Thresholds.default("int8")), len(metrics.steps))
    assert phrases == ("sqnr_db below 17 at 2 of 3 calls, worst 6.021 at timestep 900", "ssim 0.5, threshold 0.9")
    nan = Failure("sqnr_db", math.nan, 12, 500, call=1)
    assert in_words([Failure("sqnr_db", 3.0, 12, 900, call=0), nan], 3)[0].endswith("worst nan at timestep 500")
    above = [Failure("text_guidance_ratio", v, 1.667, t, True, c) for c, (v, t) in enumerate([(2, 900), (3, 500)])]
    assert in_words(above, 3) == ("text_guidance_ratio above 1.667 at 2 of 3 calls, worst 3 at timestep 500",)


def test_metrics_are_written_as_strict_json(recording, compare):
    measured = metrics_of(compare(unet, recording, guidance="text"))
    written = json.loads(json.dumps(TaskCheck(measured, Thresholds({}), 1, ()).to_json(), allow_nan=False))
    assert written["steps"][0]["guidance"][0]["direction"] == "text"
    assert written["ssim"] == written["picture_metrics"][0]["ssim"] == 1.0
