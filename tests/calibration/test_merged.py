"""Calibration sets of several tasks, merged for the one graph that serves them all."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from calibration.merged import MergedSet
from calibration.sets import CalibrationSet
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.tasks import PAPER_TASKS

CHANNELS = {"t2i": 4, "edit": 8, "sr": 8, "inpaint": 9}


def calls_of(task: int, count: int) -> list[dict[str, np.ndarray]]:
    """Numbers of the shapes a task's own graph takes; nothing here is a trajectory."""
    rng, described = np.random.default_rng(task), PAPER_TASKS[task]
    return [
        {
            "sample": rng.standard_normal((described.unet_batch, CHANNELS[described.name], 4, 4), dtype=np.float32),
            "timestep": np.full(1, 900 - i, np.float32),
            "encoder_hidden_states": rng.standard_normal((described.unet_batch, 3, 8), dtype=np.float32),
        }
        for i in range(count)
    ]


def set_of(task: int, count: int, **changed: Any) -> CalibrationSet:
    calls = calls_of(task, count)
    made = CalibrationSet(
        task=PAPER_TASKS[task].name,
        model_sha256="m",
        inputs=calls,
        timesteps=[float(call["timestep"][0]) for call in calls],
        trajectories=[0] * count,
        prompts=["a cat"],
        seeds=[1_000_007],
        size=(32, 32),
    )
    return replace(made, **changed)


def merge(*counts: int) -> MergedSet:
    sets = [set_of(task, count) for task, count in enumerate(counts)]
    tasks = {number: PAPER_TASKS[number] for number in range(len(counts))}
    return MergedSet.of({one.task: one for one in sets}, tasks, channels=9)


def test_a_call_is_the_tasks_own_with_zeros_in_the_channels_it_does_not_have() -> None:
    merged = merge(2, 2, 2, 2)
    for number, task in enumerate(PAPER_TASKS):
        own = merged.sets[task.name].inputs[1]
        call = merged.of_task(task.name)[1]
        assert (call.task, call.task_id, call.guidance) == (task.name, number, task.guided)
        assert set(call) == {*own, "task"} and len(call) == len(own) + 1
        sample, channels = call["sample"], CHANNELS[task.name]
        assert sample.shape == (task.unet_batch, 9, 4, 4) and sample.dtype == np.float32
        np.testing.assert_array_equal(sample[:, :channels], own["sample"])
        assert not sample[:, channels:].any()
        assert call["task"].dtype == np.int64 and call["task"].tolist() == [number] * task.unet_batch
        for name in ("timestep", "encoder_hidden_states"):
            assert call[name] is own[name]  # nothing is copied
    with pytest.raises(KeyError):
        merged.inputs[0]["text_embeds"]


@pytest.mark.parametrize("counts", [(10, 10, 10, 10), (12, 3, 6, 9)])
def test_the_tasks_take_turns_from_the_beginning_on(counts: tuple[int, ...]) -> None:
    merged = merge(*counts)
    order = [call.task for call in merged.inputs]
    whole = Counter(order)
    assert [whole[task.name] for task in PAPER_TASKS] == list(counts)
    for length in range(1, len(order)):
        found = Counter(order[:length])
        assert all(abs(found[name] - length * count / len(order)) <= 1.5 for name, count in whole.items())
    for task in PAPER_TASKS:  # in the order of its own set
        mine = [call for call in merged.inputs if call.task == task.name]
        assert [id(call.call) for call in mine] == [id(call) for call in merged.sets[task.name].inputs]


@pytest.mark.parametrize("count", [1, 4, 10, 17, 40, 99])
def test_a_part_of_it_is_balanced_and_spread_over_each_set(count: int) -> None:
    """Every fourth call of four tasks in turns would be one task's."""
    part = merge(10, 10, 10, 10).subset(count)
    found = Counter(call.task for call in part)
    assert len(part) == min(count, 40) and max(found.values()) - min(found[t.name] for t in PAPER_TASKS) <= 1
    steps = [float(call["timestep"][0]) for call in part if call.task == "t2i"]
    if len(steps) > 1:
        assert (steps[0], steps[-1]) == (900, 891) and len(set(steps)) == len(steps)


def test_its_hash_follows_every_set_and_what_is_made_of_them() -> None:
    merged = merge(2, 2)
    others = [
        merge(2, 3),
        replace(merged, channels=10),
        replace(merged, task_ids={"t2i": 1, "edit": 0}),
        replace(merged, guidance={"t2i": "none", "edit": "text+image"}),
    ]
    assert len({one.sha256 for one in (merged, *others)}) == 5 and merge(2, 2).sha256 == merged.sha256
    described = merged.describe()
    assert described["sha256"] == merged.sha256
    assert {name: one["sha256"] for name, one in described["tasks"].items()} == {
        name: one.sha256 for name, one in merged.sets.items()
    }


def test_sets_that_do_not_go_together_are_refused() -> None:
    tasks = dict(enumerate(PAPER_TASKS[:2]))
    first = set_of(0, 2)
    with pytest.raises(CalibrationError, match="no calibration set for task 'edit'"):
        MergedSet.of({"t2i": first}, tasks, channels=9)
    for changed in ({"model_sha256": "n"}, {"size": (64, 32)}, {"latent_channels": 16}):
        with pytest.raises(CalibrationError, match=f"'t2i' and 'edit' do not go together: {next(iter(changed))}"):
            MergedSet.of({"t2i": first, "edit": set_of(1, 2, **changed)}, tasks, channels=9)
    with pytest.raises(CalibrationError, match="'edit' has 8 channels, and the shared graph 4"):
        MergedSet.of({"t2i": first, "edit": set_of(1, 2)}, tasks, channels=4)
    with pytest.raises(CalibrationError, match="no calibration sets"):
        MergedSet.of({}, {}, channels=9)
