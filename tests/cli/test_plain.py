"""What most people try first: `mtu-compile build` on a diffusers pipeline that was never upcycled."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtu_compile import bundle, runtime

Run = Callable[..., Any]
QUICK = ("--target", "cpu", "--fp32", "--steps", 3, "--check-pictures", 1, "--calibration-pictures", 1)
NO_TORCH = "import sys; sys.modules['torch'] = sys.modules['diffusers'] = None"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text-to-image needs prompts only."""
    data = tmp_path_factory.mktemp("prompts")
    (data / "t2i").mkdir()
    rows = [json.dumps({"prompt": f"disc {letter}"}) for letter in "abcdefgh"]
    (data / "t2i" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return data


def test_a_plain_pipeline_is_told_what_is_missing_at_once(base_pipeline_dir: Path, tmp_path: Path, mtu: Run) -> None:
    for command in (("build", base_pipeline_dir, "-o", tmp_path / "b"), ("plan", base_pipeline_dir)):
        done = mtu(*command, before=NO_TORCH)
        assert done.code == 5 and "Traceback" not in done.err
        assert "is a plain StableDiffusionPipeline" in done.err and "multi-task upcycled (MTU)" in done.err
        assert f"`mtu-compile upcycle {base_pipeline_dir} -o DIR`" in done.err and "--as-task t2i" in done.err
    assert not list(tmp_path.iterdir())


def test_what_it_needs_to_be_compiled_as_it_is_is_said_at_once(
    base_pipeline_dir: Path, mtu_pipeline_dir: Path, tmp_path: Path, mtu: Run
) -> None:
    out = tmp_path / "b"
    done = mtu("build", base_pipeline_dir, "--as-task", "t2i", "-o", out, before=NO_TORCH)
    assert done.code == 5 and '--data DIR, where DIR/t2i/metadata.jsonl has 8 or more lines like {"prompt":' in done.err
    for task, said in (("edit", "does not do 'edit'"), ("sr", "choose from t2i, edit, inpaint")):
        done = mtu("build", base_pipeline_dir, "--as-task", task, "-o", out, before=NO_TORCH)
        assert done.code == 2 and said in done.err
    done = mtu("build", mtu_pipeline_dir, "--as-task", "t2i", "-o", out, before=NO_TORCH)
    assert done.code == 2 and "leave --as-task away" in done.err
    assert not list(tmp_path.iterdir())


def latents_of(folder: Path, noise: Any, **options: Any) -> Any:
    """What diffusers' own pipeline makes of a folder."""
    import torch
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline("disc b", latents=torch.from_numpy(noise.copy()), output_type="latent", **options)
    return made.images.numpy()


def genai_picture(folder: Path, noise: Any, scale: float) -> Any:
    """What OpenVINO GenAI makes of a bundle."""
    import openvino_genai as genai

    class Given(genai.Generator):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.values = iter(noise.ravel().tolist())

        def next(self) -> float:
            return float(next(self.values))

    pipeline = genai.Text2ImagePipeline(str(folder))
    pipeline.reshape(1, 32, 32, scale)
    pipeline.compile("CPU", INFERENCE_PRECISION_HINT="f32")
    return pipeline.generate("disc b", num_inference_steps=3, guidance_scale=scale, generator=Given()).data[0].copy()


def our_picture(folder: Path, noise: Any, scale: float) -> Any:
    with runtime.load(folder) as pipeline:
        return np.asarray(pipeline.run("t2i", "disc b", latents=noise, guidance_scale=scale).image)


def decibels(one: Any, other: Any) -> float:
    return float(10 * np.log10(255**2 / np.mean((one.astype(float) - other.astype(float)) ** 2)))


@pytest.mark.parametrize(
    "kind", ["stable diffusion", pytest.param("latent consistency model", marks=pytest.mark.heavy)]
)
def test_a_plain_pipeline_is_compiled_as_it_is(
    kind: str, base_pipeline_dir: Path, prompts: Path, tmp_path: Path, mtu: Run
) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    model, out = tmp_path / "model", tmp_path / "bundle"
    shutil.copytree(base_pipeline_dir, model)
    embedded = kind == "latent consistency model"
    if embedded:
        config = UNet2DConditionModel.load_config(model / "unet")
        torch.manual_seed(7)
        unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 16})
        with torch.no_grad():
            unet.time_embedding.cond_proj.weight.mul_(20)  # guidance has to matter in a random network
        unet.save_pretrained(model / "unet")
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    done = mtu("build", model, "--as-task", "t2i", "--data", prompts, "-o", out, *QUICK)
    assert done.code == 0, done.err
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "model"]

    manifest = bundle.read(out)
    task = manifest.tasks["t2i"].task
    assert manifest.provenance.as_task == "t2i" and list(manifest.tasks) == ["t2i"]
    assert (task.guidance, task.unet_batch) == (("embedded", 1) if embedded else ("text", 2))
    noise = np.random.default_rng(1).standard_normal((1, 4, 8, 8), dtype=np.float32)
    with runtime.load(out) as pipeline:
        for scale in (7.5, 3.0):
            actual = pipeline.run("t2i", "disc b", latents=noise, guidance_scale=scale).latents
            expected = latents_of(model, noise, num_inference_steps=3, guidance_scale=scale)
            assert np.linalg.norm(actual - expected) / np.linalg.norm(expected) < 1e-3, scale
    if embedded:
        for scale in (7.5, 3.0):
            assert decibels(genai_picture(out, noise, scale), our_picture(out, noise, scale)) > 45
            assert decibels(genai_picture(out, noise, scale), our_picture(out, noise, scale / 2)) < 40
        done = mtu("run", out, "--task", "t2i", "--prompt", "a", "--negative-prompt", "b", "-o", tmp_path / "a.png")
        assert done.code == 2 and "--negative-prompt has no effect" in done.err
