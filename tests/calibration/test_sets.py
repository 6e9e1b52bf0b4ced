"""Calibration sets on disk, and what ``verify`` refuses: everything but real data of this task of this model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from calibration.capture import capture
from calibration.samples import Sample
from calibration.sets import CalibrationSet, correlation, initial_noise
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.hashing import model_sha256
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.model.pipeline import MTUPipeline

EDIT = PAPER_TASKS[1]


@pytest.fixture(scope="module")
def pipeline(mtu_pipeline_dir: Path, tiny_mtu: Any) -> MTUPipeline:
    return MTUPipeline.from_pretrained(mtu_pipeline_dir, unet=tiny_mtu())


@pytest.fixture(scope="module")
def samples() -> tuple[Sample, ...]:
    rng = np.random.default_rng(2)
    picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 20))
    return tuple(Sample(prompt, picture, mask) for prompt in ("a cat", "a dog"))


@pytest.fixture(scope="module")
def real(pipeline: MTUPipeline, samples: tuple[Sample, ...]) -> CalibrationSet:
    return capture(pipeline, EDIT, samples, model_sha256="m", steps=12, calls=8)


def test_a_saved_set_comes_back_the_same(real: CalibrationSet, tmp_path: Path) -> None:
    real.save(tmp_path / "edit.safetensors")
    again = CalibrationSet.load(tmp_path / "edit.safetensors")
    assert again.sha256 == real.sha256 and len(again.inputs) == len(real.inputs) == 16
    for a, b in zip(again.inputs, real.inputs, strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    again.verify(task="edit", model_sha256="m")
    assert [path.name for path in tmp_path.iterdir()] == ["edit.safetensors"]
    text = load_file(tmp_path / "edit.safetensors")["encoder_hidden_states.values"]
    assert len(text) == 2  # once a trajectory, not once a call


def test_the_file_is_the_same_to_the_byte(
    pipeline: MTUPipeline, samples: tuple[Sample, ...], real: CalibrationSet, tmp_path: Path
) -> None:
    again = capture(pipeline, EDIT, samples, model_sha256="m", steps=12, calls=8)
    hashes = set()
    for made in (real, again):
        made.save(tmp_path / "set.safetensors")
        hashes.add((tmp_path / "set.safetensors").read_bytes())
    assert len(hashes) == 1


def test_another_task_or_model_is_refused(real: CalibrationSet) -> None:
    with pytest.raises(CalibrationError, match="for task 'edit', not 'sr'") as error:
        real.verify(task="sr", model_sha256="m")
    assert error.value.exit_code == 5 and error.value.hint
    with pytest.raises(CalibrationError, match="another model"):
        real.verify(task="edit", model_sha256="n")


def test_a_set_for_pictures_of_another_size_is_refused(real: CalibrationSet) -> None:
    real.verify(task="edit", model_sha256="m", shape=(3, 8, 8, 8))
    for shape in ((3, 8, 8, 16), (1, 8, 8, 8)):
        with pytest.raises(CalibrationError, match="captured for 32x32 pictures"):
            real.verify(task="edit", model_sha256="m", shape=shape)


def test_the_models_hash_follows_its_weights_and_configs_only(mtu_pipeline_dir: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(mtu_pipeline_dir, copy)
    (copy / "README.md").write_text("a card")
    (copy / "samples").mkdir()
    (copy / "samples" / "metadata.jsonl").write_text("{}")
    assert model_sha256(copy) == model_sha256(mtu_pipeline_dir)
    for name in ("unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):
        content = bytearray((copy / name).read_bytes())
        content[-3] ^= 1
        (copy / name).write_bytes(content)
        assert model_sha256(copy) != model_sha256(mtu_pipeline_dir)
        (copy / name).write_bytes((mtu_pipeline_dir / name).read_bytes())
    assert model_sha256(copy) == model_sha256(mtu_pipeline_dir)


def test_any_changed_byte_of_the_file_is_refused(real: CalibrationSet, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    real.save(path)
    content = path.read_bytes()
    for position in np.random.default_rng(0).integers(8, len(content), 40).tolist():
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CalibrationError, match=r"set\.safetensors"):
            CalibrationSet.load(path)
    for harmed in (content[:-10], content[:100], b"", b"hello"):
        path.write_bytes(harmed)
        with pytest.raises(CalibrationError, match=r"set\.safetensors"):
            CalibrationSet.load(path)
    path.unlink()
    with pytest.raises(CalibrationError, match=r"set\.safetensors"):
        CalibrationSet.load(path)


def test_tensors_without_a_story_are_refused(real: CalibrationSet, tmp_path: Path) -> None:
    real.save(tmp_path / "set.safetensors")
    tensors = load_file(tmp_path / "set.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(CalibrationError, match="does not say what it was made for"):
        CalibrationSet.load(tmp_path / "bare.safetensors")
    with safe_open(tmp_path / "set.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    for missing in ("task", "model_sha256", "prompts", "seeds", "timesteps", "format", "sha256"):
        header = json.loads(metadata["set"])
        del header[missing]
        save_file(tensors, tmp_path / "bare.safetensors", {**metadata, "set": json.dumps(header)})
        with pytest.raises(CalibrationError):
            CalibrationSet.load(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    "change",
    [{"prompts": ()}, {"seeds": (1,)}, {"scheduler": {}}, {"producer": {}}, {"inputs": ()}, {"timesteps": (1.0,) * 16}],
    ids=lambda change: next(iter(change)),
)
def test_an_incomplete_story_is_refused(real: CalibrationSet, change: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match="the calibration set for task 'edit'"):
        replace(real, **change).verify(task="edit", model_sha256="m")


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "LCM"])
def test_real_trajectories_of_every_task_and_sampler_pass(
    pipeline: MTUPipeline, samples: tuple[Sample, ...], scheduler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    config.pop("timestep_spacing")
    monkeypatch.setattr(pipeline, "scheduler", getattr(diffusers, f"{scheduler}Scheduler").from_config(config))
    for task in PAPER_TASKS:
        for steps in (12, 2):
            made = capture(pipeline, task, samples[:1], model_sha256="m", steps=steps)
            made.verify(task=task.name, model_sha256="m")
            assert len(made.inputs) == len(made.timesteps) > 0


def _trajectory(real: CalibrationSet, make: Callable[[int, np.random.Generator], Any]) -> CalibrationSet:
    """``real`` with the noisy latents of every call replaced by ``make(call, rng)`` [4, 8, 8]; all else in order."""
    rng = np.random.default_rng(11)
    inputs = []
    for i, call in enumerate(real.inputs):
        sample = call["sample"].copy()
        sample[:, :4] = make(i, rng)
        inputs.append({**call, "sample": sample})
    return replace(real, inputs=tuple(inputs))


def random_tensors(real: CalibrationSet) -> CalibrationSet:
    rng = np.random.default_rng(11)
    inputs = [{k: rng.standard_normal(v.shape, np.float32) for k, v in call.items()} for call in real.inputs]
    for call, old in zip(inputs, real.inputs, strict=True):
        call["timestep"] = old["timestep"]
    return replace(real, inputs=tuple(inputs))


def random_latents(real: CalibrationSet) -> CalibrationSet:
    return _trajectory(real, lambda i, rng: rng.standard_normal((4, 8, 8), np.float32))


def random_latents_from_the_right_noise(real: CalibrationSet) -> CalibrationSet:
    def make(i: int, rng: np.random.Generator) -> Any:
        first = i == 0 or real.trajectories[i] != real.trajectories[i - 1]
        if first:
            return initial_noise(real.seeds[real.trajectories[i]], real.inputs[i]["sample"], 4)
        return rng.standard_normal((4, 8, 8), np.float32)

    return _trajectory(real, make)


def uniform_latents(real: CalibrationSet) -> CalibrationSet:
    return _trajectory(real, lambda i, rng: rng.random((4, 8, 8), np.float32))


def one_latent_all_along(real: CalibrationSet) -> CalibrationSet:
    return _trajectory(
        real, lambda i, rng: initial_noise(real.seeds[real.trajectories[i]], real.inputs[i]["sample"], 4)
    )


def random_condition(real: CalibrationSet) -> CalibrationSet:
    rng = np.random.default_rng(11)
    inputs = []
    for call in real.inputs:
        sample = call["sample"].copy()
        sample[1:, 4:] = rng.standard_normal(sample[1:, 4:].shape)
        inputs.append({**call, "sample": sample})
    return replace(real, inputs=tuple(inputs))


def no_condition(real: CalibrationSet) -> CalibrationSet:
    inputs = []
    for call in real.inputs:
        sample = call["sample"].copy()
        sample[:, 4:] = 0
        inputs.append({**call, "sample": sample})
    return replace(real, inputs=tuple(inputs))


def backwards(real: CalibrationSet) -> CalibrationSet:
    return replace(real, inputs=real.inputs[::-1], timesteps=real.timesteps[::-1], trajectories=real.trajectories[::-1])


def not_finite(real: CalibrationSet) -> CalibrationSet:
    return _trajectory(real, lambda i, rng: np.full((4, 8, 8), np.nan, np.float32))


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (random_tensors, "different latents"),
        (random_latents, "not the noise of its seed"),
        (random_latents_from_the_right_noise, "not correlated"),
        (uniform_latents, "not the noise of its seed"),
        (one_latent_all_along, "do not change"),
        (random_condition, "condition changes"),
        (no_condition, "without pictures"),
        (backwards, "not the noise of its seed"),
        (not_finite, "not finite"),
    ],
)
def test_fakes_are_refused_with_the_reason(real: CalibrationSet, fake: Any, reason: str) -> None:
    real.verify(task="edit", model_sha256="m")
    with pytest.raises(CalibrationError, match=reason) as error:
        fake(real).verify(task="edit", model_sha256="m")
    assert error.value.exit_code == 5 and error.value.hint


def test_random_tensors_without_a_guidance_batch_are_refused_too(
    pipeline: MTUPipeline, samples: tuple[Sample, ...]
) -> None:
    """Super-resolution runs one sample a step: nothing to compare within a batch."""
    for steps in (1, 12):
        real = capture(pipeline, PAPER_TASKS[2], samples, model_sha256="m", steps=steps)
        real.verify(task="sr", model_sha256="m")
        with pytest.raises(CalibrationError, match="not from a denoising trajectory"):
            random_latents(real).verify(task="sr", model_sha256="m")


def test_independent_noise_stays_below_the_threshold() -> None:
    """The margin the criterion rests on: 10,000 pairs of the smallest latents in use."""
    rng = np.random.default_rng(0)
    highest = max(abs(correlation(rng.standard_normal(256), rng.standard_normal(256))) for _ in range(10_000))
    assert highest < 6 / np.sqrt(256) * 0.8
