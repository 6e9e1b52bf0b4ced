"""A model folder's scheduler and guidance, from the published file to the finished latent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from mtu_compile import runtime
from mtu_compile.compile import BuildOptions, build
from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.tasks import Task
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.sampler import check_sampler, set_timesteps, use_sampler
from mtu_compile.model.upcycle import upcycle_folder
from mtu_compile.runtime import Runtime
from mtu_compile.runtime.engine import Engine
from tests.conftest import MadeOnce
from tests.published_schedulers import PUBLISHED

TASKS = (Task("t2i", (), "text", 2.0), Task("turbo", (), "text", 0.0))


def set_scheduler(folder: Path, config: dict[str, Any], listed: str | None = None) -> Path:
    """Give a pipeline folder this ``scheduler_config.json``."""
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", listed or config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def sd15(base_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with Stable Diffusion 1.5's scheduler file, upcycled, with rows to check."""
    base = shutil.copytree(base_pipeline_dir, tmp_path_factory.mktemp("published") / "base")
    set_scheduler(base, PUBLISHED["stable-diffusion-v1-5"])
    folder = base.with_name("mtu")
    upcycle_folder(base, folder, TASKS, num_experts=2, d_task=8, router_width=8)
    for task in TASKS:
        (folder / "samples" / task.name).mkdir(parents=True)
        rows = "".join(json.dumps({"prompt": f"disc {letter}"}) + "\n" for letter in "abcd")
        (folder / "samples" / task.name / "metadata.jsonl").write_text(rows)
    return folder


@pytest.fixture(scope="module")
def built(sd15: Path, made_once: MadeOnce, shared_exports: Path) -> Path:
    """A bundle of both tasks that passed its gate with the folder's own sampler."""
    options = {"precision": "fp32", "steps": 4, "check_pictures": 1}
    return made_once("pndm", lambda folder: build(BuildOptions(sd15, folder / "bundle", **options))) / "bundle"


@pytest.fixture(scope="module")
def loaded(built: Path) -> Runtime:
    return runtime.load(built)


def float_latents(folder: Path, sampler: str, task: str = "t2i", **options: Any) -> np.ndarray:
    """What diffusers' scheduler, made from the folder's own, makes of the float model."""
    pipeline = MTUPipeline.from_pretrained(folder)
    use_sampler(pipeline, sampler)
    made = pipeline("disc a", task=task, seed=3, output_type="latent", num_inference_steps=6, **options)
    return np.asarray(made.latents.numpy())


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


def test_what_the_file_left_out_stays_left_out(sd15: Path, built: Path, loaded: Runtime) -> None:
    """The file has no timestep_spacing: leading for PNDM, linspace for Euler, as ``from_config`` has it."""
    published = {key: value for key, value in PUBLISHED["stable-diffusion-v1-5"].items() if key != "_diffusers_version"}
    assert loaded.manifest.scheduler == published
    written = json.loads((built / "scheduler" / "scheduler_config.json").read_text())
    assert {key: value for key, value in written.items() if key != "_diffusers_version"} == published
    own = diffusers.PNDMScheduler.from_pretrained(sd15, subfolder="scheduler")
    euler = diffusers.EulerDiscreteScheduler.from_config(own.config)
    assert (own.config.timestep_spacing, euler.config.timestep_spacing) == ("leading", "linspace")
    assert_close(loaded.run("t2i", "disc a", seed=3, steps=6, scheduler="euler").latents, float_latents(sd15, "euler"))


@pytest.mark.parametrize("sampler", ["pndm", "euler-a", "heun", "lcm", "unipc", "kdpm2-a", "dpm++-single"])
def test_every_kind_of_sampler_has_the_noise_and_latents_of_the_reference(
    sd15: Path, loaded: Runtime, sampler: str
) -> None:
    calls: list[tuple[int, int]] = []
    run = {"seed": 3, "steps": 6, "scheduler": sampler}
    got = loaded.run("t2i", "disc a", progress=lambda done, total: calls.append((done, total)), **run)
    assert_close(got.latents, float_latents(sd15, sampler))
    assert len(calls) == loaded.calls("t2i", 6, sampler) == calls[-1][1]
    again = loaded.run("t2i", "disc a", **run)
    np.testing.assert_array_equal(again.latents, got.latents)


def test_a_saved_pipeline_keeps_its_scheduler_file(sd15: Path, tmp_path: Path) -> None:
    MTUPipeline.from_pretrained(sd15).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    assert {**saved, "_diffusers_version": "0.6.0"} == PUBLISHED["stable-diffusion-v1-5"]


class Counting:
    """An engine that counts its runs."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, self.runs = engine, engine.inputs, 0

    def __call__(self, inputs: Any) -> Any:
        self.runs += 1
        return self.engine(inputs)

    def close(self) -> None:
        self.engine.close()


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_no_guidance_is_the_conditional_prediction(sd15: Path, loaded: Runtime, scale: float) -> None:
    """As in diffusers. With guidance 0 the unconditional one would be left: the same picture for every prompt."""
    run = {"seed": 3, "steps": 6, "scheduler": "euler", "guidance_scale": scale}
    got = loaded.run("t2i", "disc a", **run).latents
    assert_close(got, float_latents(sd15, "euler", guidance_scale=scale))
    assert np.abs(got - loaded.run("t2i", "fox", **run).latents).max() > 1e-3
    guided = loaded.run("t2i", "disc a", **{**run, "guidance_scale": 4.0})
    assert np.abs(got - guided.latents).max() > 1e-3
    assert not guided.notices
    (notice,) = loaded.run("t2i", "disc a", **run).notices
    assert notice.to_json()["samples"] == 1 and "2 samples a step all the same" in notice.message


def test_a_task_without_guidance_has_a_graph_of_one_sample(
    sd15: Path, loaded: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loaded.unet("turbo").inputs["sample"].shape[0] == 1
    assert loaded.unet("t2i").inputs["sample"].shape[0] == 2
    run = {"seed": 3, "steps": 6, "scheduler": "euler"}
    assert_close(loaded.run("turbo", "disc a", **run).latents, float_latents(sd15, "euler", "turbo"))
    engine = Counting(loaded.unet("turbo"))
    monkeypatch.setattr(loaded.networks, "open_unet", lambda entry: engine)
    got = loaded.run("turbo", "disc a", guidance_scale=4.0, **run)  # two samples: one after the other
    assert engine.runs == 12
    assert "2 times a step" in got.notices[0].message
    assert_close(got.latents, float_latents(sd15, "euler", "turbo", guidance_scale=4.0))


def test_image_guidance_below_one_is_no_guidance() -> None:
    edit = Task("edit", ("image",), "text+image", 7.5, 1.6)
    assert (edit.guided, edit.unet_batch) == ("text+image", 3)
    assert edit.at(None, 1.0).guided == "text+image"
    for scales in ((None, 0.9), (1.0, None), (0.0, 0.0)):
        off = edit.at(*scales)
        assert (off.guidance, off.guided, off.unet_batch) == ("none", "none", 1)
    with pytest.raises(ModelError, match="guidance_scale"):
        Task("edit", ("image",), "text+image", -1.0)


def test_impossible_guidance_is_refused(sd15: Path, loaded: Runtime) -> None:
    for scale in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="guidance scale"):
            loaded.run("t2i", "disc", guidance_scale=scale)
        with pytest.raises(ConfigError, match="guidance scale"):
            MTUPipeline.from_pretrained(sd15)("disc", task="t2i", guidance_scale=scale)
    with pytest.raises(ConfigError, match="--negative-prompt has no effect"):
        loaded.run("t2i", "disc", negative_prompt="blurry", guidance_scale=1.0)


@pytest.mark.usefixtures("shared_exports")
def test_a_build_with_another_sampler_passes_its_gate_and_keeps_it(sd15: Path, tmp_path: Path) -> None:
    options = {"precision": "fp32", "steps": 4, "check_pictures": 1, "tasks": ("turbo",), "sampler": "euler-a"}
    made = build(BuildOptions(sd15, tmp_path / "bundle", **options))
    assert made.check is not None and not made.check.failures
    assert made.manifest.scheduler["_class_name"] == "EulerAncestralDiscreteScheduler"
    assert "timestep_spacing" not in made.manifest.scheduler


@pytest.mark.parametrize(
    ("change", "options", "error", "words"),
    [
        ({"_class_name": "EDMEulerScheduler"}, {}, ModelError, "EDMEulerScheduler"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, {}, ModelError, "use_beta_sigmas=True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"sampler": "euler"}, ModelError, "flow matching"),
        ({"beta_end": "0.012"}, {}, ModelError, "beta_end='0.012'"),
        ({"_class_name": "DDIMScheduler"}, {"steps": 1000}, ConfigError, "timestep 1000 of 1000"),
        ({}, {"steps": 1000, "sampler": "dpm++"}, ConfigError, "cannot take 1000 steps"),
        ({}, {"sampler": "plms"}, ConfigError, "unknown sampler 'plms'"),
    ],
)
def test_what_can_not_run_is_refused_before_anything_is_loaded(
    sd15: Path, tmp_path: Path, change: Any, options: dict[str, Any], error: Any, words: str
) -> None:
    folder = tmp_path / "model"
    (folder / "scheduler").mkdir(parents=True)
    shutil.copy(sd15 / "model_index.json", folder)
    set_scheduler(folder, {**PUBLISHED["stable-diffusion-v1-5"], **change})
    with pytest.raises(error, match=words) as caught:
        check_sampler(folder, options.get("sampler"), options.get("steps", 20))
    assert caught.value.hint
    assert error is ConfigError or "scheduler_config.json" in caught.value.message
    check_sampler(folder, "ddim" if "beta_end" not in change else None, 20) if error is ConfigError else None
    with pytest.raises((ModelError, ConfigError)):
        build(BuildOptions(folder, tmp_path / "bundle", **options))
    assert not (tmp_path / "bundle").exists()


def test_a_sampler_is_the_way_out_of_an_unknown_class(sd15: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sd15, tmp_path / "model")
    set_scheduler(folder, {**PUBLISHED["stable-diffusion-v1-5"], "_class_name": "EDMEulerScheduler"})
    check_sampler(folder, "euler", 20)
    set_scheduler(folder, {**PUBLISHED["DPM++ 2M Karras"]})  # with the -Infinity that diffusers writes
    check_sampler(folder, None, 20)
    assert MTUPipeline.from_pretrained(folder).scheduler.config.lambda_min_clipped == float("-inf")


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_the_reference_takes_as_many_steps_as_asked_for(name: str) -> None:
    config = {**PUBLISHED["sd-turbo"], "_class_name": name}
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(61)
    assert int(scheduler.timesteps[-1]) == -1
    set_timesteps(scheduler, 61, "cpu")
    own = runtime.pipeline.schedulers.from_config(config, 61)
    np.testing.assert_array_equal(scheduler.timesteps.numpy(), own.timesteps)
    x, y = torch.ones(1, 1, 2, 2), np.ones((1, 1, 2, 2), np.float32)
    for index, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.sin(x), t, x).prev_sample
        y = own.step(np.sin(y), index, y)
    assert_close(y, x.numpy())
