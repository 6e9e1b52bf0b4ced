"""Plain diffusers pipelines: what they become as one task, and what they are told otherwise."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.tasks import PAPER_TASKS, Task
from mtu_compile.model.as_task import load_as_task
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.plain import AS_TASKS
from mtu_compile.model.upcycle import upcycle_folder, upcycle_unet

SMALL = {"num_experts": 2, "d_task": 8, "router_width": 8}

#: Pipeline class of each task, and its UNet's input channels.
PUBLISHED = {
    "t2i": ("StableDiffusionPipeline", 4),
    "edit": ("StableDiffusionInstructPix2PixPipeline", 8),
    "inpaint": ("StableDiffusionInpaintPipeline", 9),
}

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def published(base_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Factory: the tiny pipeline with another UNet, under the name of the pipeline that is published with it."""

    def make(kind: str, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("published") / "pipeline"
        shutil.copytree(base_pipeline_dir, folder)
        plain = diffusers.UNet2DConditionModel.load_config(folder / "unet")
        torch.manual_seed(7)
        diffusers.UNet2DConditionModel.from_config({**plain, **config}).save_pretrained(folder / "unet")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": kind}))
        return folder

    return make


def theirs(folder: Path, cls: Any = diffusers.DiffusionPipeline, **components: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = cls.from_pretrained(
            folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **components
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def mask() -> Image.Image:
    drawn = Image.new("L", (32, 32))
    drawn.paste(255, (8, 8, 24, 20))  # whole latent pixels, which every way to shrink it sees alike
    return drawn


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_one_task_a_plain_pipeline_is_what_diffusers_makes_of_it(name: str, published: Make) -> None:
    kind, channels = PUBLISHED[name]
    folder = published(kind, in_channels=channels)
    original, ours = theirs(folder), load_as_task(folder, name)
    assert type(original).__name__ == kind
    options: dict[str, Any] = {"num_inference_steps": 4, "latents": noise(), "output_type": "latent"}
    given: dict[str, Any] = {}
    if name == "edit":
        options |= {"image": picture()}
        given = {"image": picture()}
    if name == "inpaint":
        pixels = torch.from_numpy(np.asarray(picture()).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        kept = pixels * (1 - torch.from_numpy(np.asarray(mask(), np.float32) / 255))
        with torch.no_grad():
            # diffusers draws a sample where we take the mean
            encoded = original.vae.encode(kept).latent_dist.mean * original.vae.config.scaling_factor
        options |= {"image": picture(), "mask_image": mask(), "masked_image_latents": encoded, "strength": 1.0}
        options |= {"height": 32, "width": 32}
        given = {"image": picture(), "mask_image": mask()}
    expected = original("a cat", **options).images
    actual = ours("a cat", task=name, num_inference_steps=4, latents=noise(), output_type="latent", **given).latents
    assert float((actual - expected).norm() / expected.norm()) < 1e-4
    assert ours.unet.config.num_experts == 1 and ours.unet.tasks == (AS_TASKS[name],)


@torch.no_grad()
def test_a_condition_goes_to_the_tasks_that_have_it(published: Make, tmp_path: Path) -> None:
    folder = published("StableDiffusionInpaintPipeline", in_channels=9)
    turned = Task("turned", ("masked_image", "image", "mask"), "text")
    upcycle_folder(folder, tmp_path / "mtu", [*PAPER_TASKS, turned], **SMALL)
    unet = MTUPipeline.from_pretrained(tmp_path / "mtu").unet
    weight = theirs(folder).unet.conv_in.weight
    t2i, edit, sr, inpaint, other = (conv.weight for conv in unet.task_conv_in.convs)
    assert unet.config.in_channels == 4
    assert torch.equal(inpaint, weight)
    assert torch.equal(t2i, weight[:, :4])
    for one in (edit, sr):
        assert torch.equal(one[:, :4], weight[:, :4]) and not one[:, 4:].any()
    assert torch.equal(
        other, torch.cat([weight[:, :4], weight[:, 5:9], torch.zeros_like(weight[:, :4]), weight[:, 4:5]], 1)
    )


def test_an_editing_unet_sees_unscaled_pictures(published: Make, tmp_path: Path) -> None:
    """InstructPix2Pix was trained on them; tasks give scaled ones, so the factor goes into the weights."""
    folder = published("StableDiffusionInstructPix2PixPipeline", in_channels=8)
    upcycle_folder(folder, tmp_path / "mtu", PAPER_TASKS, **SMALL)
    pipeline = MTUPipeline.from_pretrained(tmp_path / "mtu")
    weight = theirs(folder).unet.conv_in.weight
    edit = pipeline.unet.task_conv_in.convs[1].weight
    assert torch.equal(edit[:, :4], weight[:, :4])
    assert torch.allclose(edit[:, 4:] * pipeline.vae.config.scaling_factor, weight[:, 4:])


def test_channels_nobody_described_are_refused(published: Make, tmp_path: Path) -> None:
    for kind, channels in (("StableDiffusionPipeline", 8), ("StableDiffusionInpaintPipeline", 7)):
        with pytest.raises(ModelError, match=f"takes {channels} channels .* {kind}") as error:
            upcycle_folder(published(kind, in_channels=channels), tmp_path / "mtu", PAPER_TASKS, **SMALL)
        assert "StableDiffusionInstructPix2PixPipeline" in str(error.value.hint)
    inpainting = published("StableDiffusionInpaintPipeline", in_channels=9)
    with pytest.raises(ModelError, match="none of the tasks has one"):
        upcycle_folder(inpainting, tmp_path / "mtu", PAPER_TASKS[:2], **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "channels", "name", "hint"),
    [
        ("StableDiffusionPipeline", 4, "inpaint", "--as-task t2i"),
        ("StableDiffusionInpaintPipeline", 9, "t2i", "--as-task inpaint"),
        ("StableDiffusionPipeline", 4, "sr", "t2i, edit, inpaint"),
    ],
)
def test_a_task_that_is_not_the_pipelines_is_refused(
    kind: str, channels: int, name: str, hint: str, published: Make
) -> None:
    with pytest.raises(ConfigError) as error:
        load_as_task(published(kind, in_channels=channels), name)
    assert hint in str(error.value.hint)


def test_a_unet_without_a_size_of_its_own_asks_for_one(published: Make) -> None:
    pipeline = load_as_task(published("StableDiffusionPipeline", sample_size=None), "t2i")
    assert pipeline.resolve_size(32, 64) == (32, 64)
    with pytest.raises(ConfigError, match="no sample_size") as error:
        pipeline.resolve_size()
    assert "--size" in str(error.value.hint)


def test_a_multi_task_folder_is_not_taken_as_plain(mtu_pipeline_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no plain diffusers pipeline"):
        load_as_task(mtu_pipeline_dir, "t2i")


def lcm(published: Make) -> Path:
    folder = published("LatentConsistencyModelPipeline", time_cond_proj_dim=16)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.mul_(20)  # guidance has to matter in a random network
    weights.unlink()
    unet.save_pretrained(folder / "unet")
    diffusers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    ).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "LCMScheduler"]}))
    return folder


@pytest.mark.parametrize("scale", [1.0, 8.5])
def test_a_latent_consistency_model_is_told_its_guidance_scale(scale: float, published: Make) -> None:
    folder = lcm(published)
    original, ours = theirs(folder), load_as_task(folder, "t2i")
    assert type(original).__name__ == "LatentConsistencyModelPipeline"
    options: dict[str, Any] = {"guidance_scale": scale, "num_inference_steps": 4, "output_type": "latent"}
    made = {}
    calls: list[dict[str, torch.Tensor]] = []
    for name, pipeline, more in (
        ("theirs", original, {}),
        ("ours", ours, {"task": "t2i", "on_unet_call": lambda call, output, t: calls.append(call)}),
    ):
        generator = torch.Generator().manual_seed(3)  # the scheduler draws at every step
        made[name] = pipeline("a cat", latents=noise(), generator=generator, **options, **more)
    expected, actual = made["theirs"].images, made["ours"].latents
    assert float((actual - expected).norm() / expected.norm()) < 1e-3
    assert calls[0]["timestep_cond"].shape == (1, 16) and calls[0]["sample"].shape[0] == 1
    other = ours(
        "a cat",
        task="t2i",
        latents=noise(),
        generator=torch.Generator().manual_seed(3),
        **{**options, "guidance_scale": 4.0},
    )
    assert float((other.latents - expected).norm() / expected.norm()) > 1e-2


def test_a_latent_consistency_model_is_not_trained(published: Make) -> None:
    from mtu_compile.model.recipe import require_trainable

    unet = diffusers.UNet2DConditionModel.from_pretrained(lcm(published) / "unet")
    with pytest.raises(ModelError, match="time_cond_proj_dim = 16"):
        require_trainable(upcycle_unet(unet, PAPER_TASKS, **SMALL))
