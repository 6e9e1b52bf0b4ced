"""Fewer whole UNet calls: which are whole, what the others are given, and pictures that share their calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from mtu_compile.bundle import EngineRef, StepCache
from mtu_compile.runtime import schedulers
from mtu_compile.runtime.engine import OUTPUT, Array, TensorSpec
from mtu_compile.runtime.step_cache import (
    DEEP,
    Remembered,
    predict,
    whole_calls,
    without_deep_feature,
)
from tests.runtime.conftest import SCHEDULER

REF = EngineRef("openvino", "unet_shallow/openvino_model.xml")


def cache(*whole_at: float, slope: float = 1.0) -> StepCache:
    return StepCache(REF, whole_at, slope)


class Net:
    """A UNet of arithmetic: its deep feature is linear in the timestep, and is added to the sample."""

    def __init__(self, *, shallow: bool = False, batch: int | None = None) -> None:
        f32 = np.dtype(np.float32)
        one = TensorSpec("", (batch, 1, 2, 2), f32)
        self.inputs: Mapping[str, TensorSpec] = {"sample": one, "timestep": TensorSpec("", (1,), f32)}
        self.outputs: Mapping[str, TensorSpec] = {OUTPUT: one}
        if shallow:
            self.inputs = {**self.inputs, DEEP: one}
        else:
            self.inputs = {**self.inputs, "task": TensorSpec("", (batch,), np.dtype(np.int64))}
            self.outputs = {**self.outputs, DEEP: one}
        self.shallow, self.runs, self.closed = shallow, list[int](), False

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert inputs.keys() == self.inputs.keys()
        sample, timestep = inputs["sample"], inputs["timestep"]
        self.runs.append(len(sample))
        if self.shallow:
            return {OUTPUT: sample + inputs[DEEP]}
        scale = (inputs["task"][:, None, None, None] + 1).astype(np.float32)
        deep = scale * timestep[0] * np.ones((1, 1, 2, 2), np.float32)
        return {OUTPUT: sample + deep, DEEP: deep}

    def close(self) -> None:
        self.closed = True


def test_without_a_cache_every_call_is_whole() -> None:
    assert whole_calls([9, 5, 1], None) == (True, True, True)


def test_the_first_call_at_or_below_each_timestep_is_whole() -> None:
    timesteps = [999, 899, 799, 699, 599, 499]
    assert whole_calls(timesteps, cache(999, 799, 599)) == (True, False, True, False, True, False)
    assert whole_calls(timesteps, cache(990, 650)) == (True, True, False, False, True, False)
    assert whole_calls(timesteps, cache(1)) == (True, False, False, False, False, False)  # the first always is
    assert whole_calls([999, 500], cache(999, 900, 800, 600)) == (True, True)  # fewer steps: one call for several


@pytest.mark.parametrize("name", schedulers.NAMES)
@pytest.mark.parametrize("steps", [6, 20, 41])
def test_every_sampler_has_a_schedule(name: str, steps: int) -> None:
    wanted = [float(one) for one in schedulers.from_config(SCHEDULER, 20, "ddim").timesteps]
    used = cache(*wanted[::4])
    sampler = schedulers.from_config(SCHEDULER | {"rescale_betas_zero_snr": False}, steps, name)
    calls = whole_calls(sampler.timesteps, used)
    assert calls[0] and sum(calls) <= len(used.whole_at) + 1
    assert sum(calls) >= min(len(used.whole_at), steps) - 1  # the last may lie below the sampler's last timestep


def test_the_deep_feature_goes_on_along_its_line() -> None:
    one = Remembered(np.array([10.0, 8.0, 6.0, 4.0, 3.0, 2.0]), cache(10, 6, slope=1.0))
    assert one.whole == (True, False, True, False, False, False)
    one.keep(0, np.full((1, 1, 1, 1), 10, np.float32))
    assert one.at(1) == 10  # there is only one yet
    one.keep(2, np.full((1, 1, 1, 1), 6, np.float32))
    assert [float(one.at(call).item()) for call in (3, 4, 5)] == [4, 3, 2]
    half = Remembered(np.array([10.0, 6.0, 4.0]), cache(10, 6, slope=0.5))
    half.keep(0, np.full((1, 1, 1, 1), 10, np.float32))
    half.keep(1, np.full((1, 1, 1, 1), 6, np.float32))
    assert half.at(2).item() == 5
    still = Remembered(np.array([10.0, 6.0, 4.0]), cache(10, 6, slope=0.0))
    still.keep(0, np.full((1, 1, 1, 1), 10, np.float32))
    still.keep(1, np.full((1, 1, 1, 1), 6, np.float32))
    assert still.at(2).item() == 6


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_pictures_of_different_schedules_are_as_by_themselves(batch: int | None) -> None:
    timesteps = np.array([10.0, 8.0, 6.0, 4.0, 2.0])
    caches = [cache(10, 6), None, cache(10, 8, 2), cache(10, slope=0.0)]
    parts = [slice(0, 2), slice(2, 3), slice(3, 6), slice(6, 7)]
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((len(timesteps), 7, 1, 2, 2)).astype(np.float32)
    tasks = np.array([0, 0, 1, 2, 2, 2, 3])

    def trajectory(chosen: list[int]) -> tuple[list[Array], Net, Net]:
        whole, shallow = Net(batch=batch), Net(shallow=True, batch=batch)
        rows = np.concatenate([np.arange(7)[parts[index]] for index in chosen])
        sizes = [parts[index].stop - parts[index].start for index in chosen]
        ends = np.cumsum(sizes)
        own = [slice(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True)]
        remembered = [Remembered(timesteps, caches[index]) for index in chosen]
        answers = []
        for call, timestep in enumerate(timesteps):
            given: dict[str, Any] = {
                "sample": samples[call][rows],
                "timestep": np.array([timestep], np.float32),
                "task": tasks[rows],
            }
            answers.append(predict(whole, shallow, given, own, remembered, call))
        return answers, whole, shallow

    together, whole, shallow = trajectory([0, 1, 2, 3])
    for index, part in enumerate(parts):
        alone, _, _ = trajectory([index])
        for ours, theirs in zip(together, alone, strict=True):
            np.testing.assert_array_equal(ours[part], theirs)
    if batch is None:  # of 7 samples at the first call, 2 + 1 + … at the others
        assert whole.runs == [7, 4, 3, 1, 4]
        assert shallow.runs == [3, 4, 6, 3]
    every, _, _ = trajectory([1])
    np.testing.assert_array_equal(
        every[2], samples[2][2:3] + np.float32(2 * 6)
    )  # whole: the feature of that very timestep
    np.testing.assert_allclose(together[3][:2], samples[3][:2] + 4, atol=1e-6)  # a line is carried on without error
    np.testing.assert_allclose(together[3][6:], samples[3][6:] + 4 * 10, atol=1e-6)  # and without slope it stays


def test_a_unet_is_compared_without_its_deep_feature() -> None:
    net = Net()
    plain = without_deep_feature(net)
    assert plain.outputs.keys() == {OUTPUT}
    given = {"sample": np.ones((1, 1, 2, 2), np.float32), "timestep": np.ones(1, np.float32), "task": np.zeros(1, int)}
    assert plain(given).keys() == {OUTPUT}
    plain.close()
    assert net.closed
    shallow = Net(shallow=True)
    assert without_deep_feature(shallow) is shallow
