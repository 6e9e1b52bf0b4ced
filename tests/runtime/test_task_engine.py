"""One task of a shared engine as an engine of its own, on real OpenVINO models of every kind of batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import openvino
import pytest
from openvino import opset13 as ops

from mtu_compile.core.errors import TargetError
from mtu_compile.runtime.batches import run_samples
from mtu_compile.runtime.engine import Array, Engine, open_engine
from mtu_compile.runtime.task_engine import TaskEngine

WIDTH, SIZE, TASKS = 9, 4, 3
WEIGHTS = np.random.default_rng(0).standard_normal((TASKS, WIDTH)).astype(np.float32)


def save_shared(path: Path, batch: int | None) -> Path:
    """out = sample's channels weighted by the task's row, plus the timestep, times the sample's own text."""
    free = -1 if batch is None else batch
    sample = ops.parameter(openvino.PartialShape([free, WIDTH, SIZE, SIZE]), np.float32, name="sample")
    task = ops.parameter(openvino.PartialShape([free]), np.int64, name="task")
    timestep = ops.parameter([1], np.float32, name="timestep")
    text = ops.parameter(openvino.PartialShape([free, 2, 3]), np.float32, name="encoder_hidden_states")
    axis = ops.constant(np.int64(0))
    row = ops.unsqueeze(ops.gather(ops.constant(WEIGHTS), task, axis), ops.constant(np.array([2, 3])))
    mixed = ops.reduce_sum(ops.multiply(sample, row), ops.constant(np.array([1])), keep_dims=True)
    said = ops.unsqueeze(ops.reduce_sum(text, ops.constant(np.array([1, 2]))), ops.constant(np.array([1, 2, 3])))
    out = ops.multiply(ops.add(mixed, timestep), said)
    for node in (sample, task, timestep, text):
        node.output(0).set_names({node.friendly_name})
    out.output(0).set_names({"out_sample"})
    openvino.save_model(openvino.Model([out], [sample, task, timestep, text]), path, compress_to_fp16=False)
    return path


def feeds(samples: int, channels: int, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "sample": random.standard_normal((samples, channels, SIZE, SIZE)).astype(np.float32),
        "timestep": np.array([7], np.float32),
        "encoder_hidden_states": random.standard_normal((samples, 2, 3)).astype(np.float32),
    }


def expected(task: int, inputs: dict[str, Array]) -> Array:
    sample = inputs["sample"]
    mixed = np.einsum("nchw,c->nhw", sample, WEIGHTS[task, : sample.shape[1]])[:, None]
    return (mixed + inputs["timestep"]) * inputs["encoder_hidden_states"].sum((1, 2))[:, None, None, None]


class Counted:
    """An engine, and how many samples each of its runs had."""

    def __init__(self, engine: Engine) -> None:
        self.inputs, self.outputs, self.close = engine.inputs, engine.outputs, engine.close
        self.engine, self.runs = engine, list[int]()

    def __call__(self, inputs: dict[str, Array]) -> dict[str, Array]:
        self.runs.append(len(inputs["sample"]))
        return self.engine(inputs)


@pytest.fixture(params=[None, 1, 2], ids=["free", "one", "two"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Counted]:
    path = save_shared(tmp_path / "net.xml", request.param)
    engine = Counted(open_engine("openvino", path, {"INFERENCE_PRECISION_HINT": "f32"}))
    yield engine
    engine.close()


def test_every_task_of_any_number_of_samples(shared: Counted) -> None:
    batch = shared.inputs["sample"].shape[0]
    for task, channels in ((0, 4), (1, 8), (2, 9), (0, 4)):
        one = TaskEngine(shared, task, channels)
        assert {name: spec.shape for name, spec in one.inputs.items()} == {
            "sample": (None, channels, SIZE, SIZE),
            "timestep": (1,),
            "encoder_hidden_states": (None, 2, 3),
        }
        assert {name: spec.shape for name, spec in one.outputs.items()} == {"out_sample": (None, 1, SIZE, SIZE)}
        for samples in (1, 2, 3):
            shared.runs.clear()
            inputs = feeds(samples, channels)
            np.testing.assert_allclose(one(inputs)["out_sample"], expected(task, inputs), rtol=1e-4, atol=1e-4)
            assert shared.runs == ([samples] if batch is None else [batch] * -(-samples // batch))


@pytest.mark.parametrize("shared", [None], indirect=True)
def test_no_run_has_more_samples_than_the_engine_takes(shared: Counted) -> None:
    """As with a TensorRT engine of any batch up to one: no sample is computed in vain."""
    shared.inputs = {
        name: replace(spec, most=None if name == "timestep" else 2) for name, spec in shared.inputs.items()
    }
    inputs = feeds(5, 8)
    answer = TaskEngine(shared, 1, 8)(inputs)["out_sample"]
    np.testing.assert_allclose(answer, expected(1, inputs), rtol=1e-4, atol=1e-4)
    assert shared.runs == [2, 2, 1]
    assert not shared.inputs["sample"].accepts(np.zeros((3, WIDTH, SIZE, SIZE), np.float32))


def test_answers_and_inputs_belong_to_the_caller(shared: Counted) -> None:
    """What was answered, and what was asked, is not touched by the next call, of this task or another one."""
    first, other = TaskEngine(shared, 0, 4), TaskEngine(shared, 2, 9)
    inputs, wide = feeds(3, 4), feeds(3, 9, seed=1)
    before = {name: array.copy() for name, array in inputs.items()}
    answer = first(inputs)["out_sample"]
    kept = answer.copy()
    other(wide)
    first(feeds(3, 4, seed=2))
    np.testing.assert_array_equal(answer, kept)
    for name, array in inputs.items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(first(inputs)["out_sample"], kept)


def test_closing_a_task_leaves_the_shared_engine_open(shared: Counted) -> None:
    one, other = TaskEngine(shared, 0, 4), TaskEngine(shared, 1, 8)
    one.close()
    one.close()
    with pytest.raises(TargetError, match="closed"):
        one(feeds(1, 4))
    other(feeds(1, 8))
    TaskEngine(shared, 0, 4, owned=True).close()
    with pytest.raises(TargetError, match="closed"):
        other(feeds(1, 8))


def test_wrong_inputs_are_refused(shared: Counted) -> None:
    one = TaskEngine(shared, 1, 8)
    good = feeds(2, 8)
    for change, words in (
        ({"sample": feeds(2, 9)["sample"]}, r"takes 'sample' as float32 \[\?, 8, 4, 4\]"),
        ({"encoder_hidden_states": feeds(3, 8)["encoder_hidden_states"]}, "2 samples, and 3 of"),
        ({name: array if name == "timestep" else array[:0] for name, array in good.items()}, "no sample"),
        ({"task": np.zeros(2, np.int64)}, "has no input 'task'"),
    ):
        with pytest.raises(TargetError, match=words):
            one({**good, **change})
    with pytest.raises(TargetError, match="takes 9 channels, and the task has 10"):
        TaskEngine(shared, 0, 10)


def test_an_engine_that_knows_no_tasks_is_refused(shared: Counted) -> None:
    with pytest.raises(TargetError, match="no input 'task'"):
        TaskEngine(TaskEngine(shared, 0, 4), 0, 4)


def test_samples_of_several_tasks_in_one_call(shared: Counted) -> None:
    tasks = np.array([2, 0, 1, 2, 0])
    inputs = feeds(5, WIDTH)
    answer = run_samples(shared, {**inputs, "task": tasks})["out_sample"]
    for index, task in enumerate(tasks):
        one = {name: array if name == "timestep" else array[index : index + 1] for name, array in inputs.items()}
        np.testing.assert_allclose(answer[index : index + 1], expected(int(task), one), rtol=1e-4, atol=1e-4)
