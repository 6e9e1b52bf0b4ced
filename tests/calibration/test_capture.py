"""What is captured is what the UNet sees, the same every time, from all over the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.capture import capture, pick, stratified
from calibration.samples import Sample
from calibration.sets import SEED_OFFSET
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.tasks import PAPER_TASKS, Task
from mtu_compile.model.pipeline import MTUPipeline

SAMPLINGS = ("stratified", "uniform", "random")


@pytest.fixture(scope="module")
def pipeline(mtu_pipeline_dir: Path, tiny_mtu: Any) -> MTUPipeline:
    return MTUPipeline.from_pretrained(mtu_pipeline_dir, unet=tiny_mtu())


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    rng = np.random.default_rng(2)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 20))
    return tuple(Sample(prompt, picture, mask) for prompt, picture in zip(("a cat", "a dog"), pictures, strict=True))


@pytest.mark.parametrize("task", PAPER_TASKS, ids=lambda task: task.name)
def test_captured_inputs_are_the_static_graphs(pipeline: MTUPipeline, samples: tuple[Sample, ...], task: Task) -> None:
    """Running the UNet on the captured inputs gives the very outputs of the pipeline's own run."""
    done: list[int] = []
    made = capture(pipeline, task, samples, model_sha256="m", steps=4, calls=None, progress=done.append)
    assert done == [1, 1] and len(made.inputs) == 8 and made.trajectories == (0,) * 4 + (1,) * 4
    channels = 4 + task.condition_channels(4)
    for call in made.inputs:
        assert call["sample"].shape == (task.unet_batch, channels, 8, 8)
        assert call["encoder_hidden_states"].shape == (task.unet_batch, 16, 32)
        assert call["timestep"].shape == (1,) and all(array.dtype == np.float32 for array in call.values())
    seen: list[Any] = []
    pipeline(
        samples[1].prompt, task=task.name, image=samples[1].image, mask_image=samples[1].mask, seed=SEED_OFFSET + 1,
        num_inference_steps=4, output_type="latent", on_unet_call=lambda call, output, t: seen.append(output),
    )  # fmt: skip
    ids = torch.full((task.unet_batch,), PAPER_TASKS.index(task))
    for call, expected in zip(made.inputs[4:], seen, strict=True):
        tensors = {name: torch.from_numpy(array) for name, array in call.items()}
        with torch.no_grad():
            assert torch.equal(pipeline.unet(**tensors, task_ids=ids).sample, expected)


def test_equal_captures_have_equal_hashes_and_others_do_not(pipeline: MTUPipeline, samples: tuple[Sample, ...]) -> None:
    task = PAPER_TASKS[1]
    options: dict[str, Any] = {"model_sha256": "m", "steps": 8, "calls": 4}
    first = capture(pipeline, task, samples, **options)
    assert capture(pipeline, task, samples, **options).sha256 == first.sha256
    assert capture(pipeline, task, samples, seed=1, **options).sha256 != first.sha256
    assert capture(pipeline, task, samples[::-1], **options).sha256 != first.sha256
    assert capture(pipeline, task, samples, **{**options, "model_sha256": "n"}).sha256 != first.sha256


def test_a_set_says_what_made_it(pipeline: MTUPipeline, samples: tuple[Sample, ...]) -> None:
    made = capture(pipeline, PAPER_TASKS[0], samples, model_sha256="m", steps=8, calls=4, seed=5)
    assert made.prompts == ("a cat", "a dog") and made.seeds == (SEED_OFFSET + 5, SEED_OFFSET + 6)
    assert made.scheduler["_class_name"] == "DDIMScheduler" and made.scheduler["beta_end"] == 0.012
    assert made.steps == 8 and made.producer["torch"] == torch.__version__
    assert made.timesteps == tuple(float(call["timestep"][0]) for call in made.inputs)
    said = made.describe()
    assert (said["pictures"], said["calls"], said["steps"], said["seed"]) == (2, 8, 8, 5)
    assert said["timesteps"] == sorted(set(made.timesteps), reverse=True) and said["sha256"] == made.sha256
    assert tuple(made.size) == (32, 32)


def test_kept_steps_are_spread_over_the_schedule() -> None:
    for total, calls in ((20, 10), (20, 7), (50, 10), (9, 4)):
        met = set()
        longest = -(-total // calls)
        for turn in range(longest):
            kept = stratified(total, calls, turn)
            assert len(kept) == calls and kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] < total
            met |= set(kept)
        # Every step but those that share the first stratum with step 0.
        assert set(range(total // calls, total)) <= met
    assert stratified(4, 10, 3) == stratified(4, None, 3) == [0, 1, 2, 3]


def test_samplings_keep_different_steps_and_all_the_first(pipeline: MTUPipeline, samples: tuple[Sample, ...]) -> None:
    options: dict[str, Any] = {"model_sha256": "m", "steps": 12, "calls": 6}
    sets = {name: capture(pipeline, PAPER_TASKS[0], samples, sampling=name, **options) for name in SAMPLINGS}
    assert len({made.sha256 for made in sets.values()}) == 3
    for name, made in sets.items():
        assert made.describe()["strategy"] == name and made.describe()["calls"] == 12
        made.verify(task="t2i", model_sha256="m")
    times = {name: (made.timesteps[:6], made.timesteps[6:]) for name, made in sets.items()}
    assert times["uniform"][0] == times["uniform"][1]
    assert times["stratified"][0] != times["stratified"][1] and times["random"][0] != times["random"][1]
    again = capture(pipeline, PAPER_TASKS[0], samples, sampling="random", **options)
    assert again.sha256 == sets["random"].sha256


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_sampling_keeps_as_many_as_asked_for(sampling: Any) -> None:
    for total, calls in ((20, 10), (20, 7), (20, 1), (9, 4)):
        kept = pick(sampling, total, calls, 3, 8)
        assert len(kept) == calls and kept == sorted(set(kept)) and kept[0] == 0 and kept[-1] < total
    assert pick(sampling, 4, 10, 0, 0) == pick(sampling, 4, None, 0, 0) == [0, 1, 2, 3]
    assert pick("uniform", 20, 2, 0, 0) == [0, 19]


def test_no_samples_are_an_error(pipeline: MTUPipeline) -> None:
    with pytest.raises(CalibrationError, match="'t2i'"):
        capture(pipeline, PAPER_TASKS[0], (), model_sha256="m", steps=2)
