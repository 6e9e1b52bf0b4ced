"""SDXL as a pipeline: its folder, its two text encoders, its sizes; against diffusers' own pipelines."""

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
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.model.as_task import load_as_task
from mtu_compile.model.folder import check_folder
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.upcycle import upcycle_folder
from tests.tiny_sdxl import as_published, save_sdxl_pipeline

SIZES = {"original_size": (480, 640), "crops_coords_top_left": (16, 32), "target_size": (1024, 768)}


def theirs(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def apart(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("given", [{}, SIZES, {"negative_prompt": "a dog"}, {"guidance_scale": 1.0}])
def test_a_plain_sdxl_pipeline_is_what_diffusers_makes_of_it(sdxl_pipeline_dir: Path, given: Any) -> None:
    options: dict[str, Any] = {"num_inference_steps": 4, "latents": noise(), "output_type": "latent", **given}
    expected = theirs(sdxl_pipeline_dir)("a cat", **options).images
    ours = load_as_task(sdxl_pipeline_dir, "t2i")
    assert apart(ours("a cat", task="t2i", **options).latents, expected) < 1e-4
    # and none of it is without effect
    for other in ({**options, "original_size": (8, 8)}, {**options, "crops_coords_top_left": (8, 8)}):
        assert apart(ours("a cat", task="t2i", **other).latents, expected) > 1e-3
    assert apart(ours("a dog", task="t2i", **options).latents, expected) > 1e-3


def test_an_empty_negative_prompt_is_zeros_where_the_folder_says_so(sdxl_pipeline_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sdxl_pipeline_dir, tmp_path / "encoded"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    options: dict[str, Any] = {"num_inference_steps": 3, "latents": noise(), "output_type": "latent"}
    made = {}
    for name, place in (("zeros", sdxl_pipeline_dir), ("encoded", folder)):
        made[name] = load_as_task(place, "t2i")("a cat", task="t2i", **options).latents
        assert apart(made[name], theirs(place)("a cat", **options).images) < 1e-4
    assert apart(made["zeros"], made["encoded"]) > 1e-3
    upcycle_folder(folder, tmp_path / "mtu", PAPER_TASKS[:1], d_task=8, router_width=8)
    assert not MTUPipeline.from_pretrained(tmp_path / "mtu").texts.zeros_for_empty


def test_an_editing_sdxl_pipeline_is_what_diffusers_makes_of_it(tmp_path: Path) -> None:
    folder = save_sdxl_pipeline(tmp_path / "edit", in_channels=8)
    index = json.loads((folder / "model_index.json").read_text())
    kind = {"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index | kind))
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    options: dict[str, Any] = {"num_inference_steps": 3, "latents": noise(), "output_type": "latent"}
    expected = theirs(folder)("a cat", image=picture, height=32, width=32, **options).images
    ours = load_as_task(folder, "edit")
    assert ours.unet.tasks[0].guidance_scale == 5.0
    # The picture's latent is scaled before its weights are, elsewhere it is neither: sums of large numbers.
    assert apart(ours("a cat", task="edit", image=picture, **options).latents, expected) < 1e-3


def hole() -> Image.Image:
    """Of whole latent pixels, which every way to shrink it sees alike."""
    drawn = Image.new("L", (32, 32))
    drawn.paste(255, (8, 8, 24, 20))
    return drawn


@torch.no_grad()
def masked_latents(vae: Any, picture: Image.Image, mask: Image.Image) -> torch.Tensor:
    """What diffusers' inpainting pipelines encode of a picture; they draw a sample, and we take the mean."""
    pixels = torch.from_numpy(np.asarray(picture).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    kept = pixels * (1 - torch.from_numpy(np.asarray(mask, np.float32) / 255))
    encoded: torch.Tensor = vae.encode(kept).latent_dist.mean * vae.config.scaling_factor
    return encoded


@pytest.mark.parametrize("given", [{}, SIZES, {"negative_prompt": "a dog", "guidance_scale": 3.0}])
def test_an_inpainting_sdxl_pipeline_is_what_diffusers_makes_of_it(tmp_path: Path, given: Any) -> None:
    folder = save_sdxl_pipeline(tmp_path / "inpaint", in_channels=9)
    index = json.loads((folder / "model_index.json").read_text())
    kind = {"_class_name": "StableDiffusionXLInpaintPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index | kind))
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    options: dict[str, Any] = {"num_inference_steps": 4, "latents": noise(), "output_type": "latent", **given}
    original, ours = theirs(folder), load_as_task(folder, "inpaint")
    assert isinstance(original, diffusers.StableDiffusionXLInpaintPipeline)
    source = {"image": picture, "mask_image": hole()}
    encoded = masked_latents(original.vae, picture, hole())
    size = {"height": 32, "width": 32, "strength": 1.0}
    expected = original("a cat", masked_image_latents=encoded, **source, **size, **options).images
    made = ours("a cat", task="inpaint", **source, **options).latents
    assert apart(made, expected) < 1e-4
    elsewhere = hole().transpose(Image.Transpose.ROTATE_90)
    assert apart(ours("a cat", task="inpaint", image=picture, mask_image=elsewhere, **options).latents, made) > 1e-3


def test_upcycled_it_does_what_it_did_and_four_tasks(
    sdxl_pipeline_dir: Path, sdxl_mtu_dir: Path, tmp_path: Path
) -> None:
    pipeline = MTUPipeline.from_pretrained(sdxl_mtu_dir)
    assert pipeline.unet.config.num_experts == 1
    options: dict[str, Any] = {"num_inference_steps": 3, "latents": noise()}
    expected = theirs(sdxl_pipeline_dir)("a cat", guidance_scale=7.5, output_type="np", **options).images
    made = pipeline("a cat", task="t2i", output_type="np", **options)
    assert np.abs(made.images - expected).max() < 1e-4
    picture = Image.fromarray(np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    hole = Image.new("L", (32, 32), 255)
    for task, given in (("edit", {}), ("sr", {}), ("inpaint", {"mask_image": hole})):
        image = picture.reduce(4) if task == "sr" else picture
        prompt = "" if task == "sr" else "a cat"
        other = pipeline(prompt, task=task, image=image, num_inference_steps=2, seed=0, output_type="np", **given)
        assert np.isfinite(other.images).all() and other.images.std() > 0
    # saved and loaded again it is the same
    pipeline.save_pretrained(tmp_path / "saved")
    again = MTUPipeline.from_pretrained(tmp_path / "saved")("a cat", task="t2i", output_type="np", **options)
    assert np.array_equal(again.images, made.images)


def test_a_folder_as_it_is_published_goes_in(sdxl_pipeline_dir: Path, tmp_path: Path) -> None:
    folder = as_published(Path(shutil.copytree(sdxl_pipeline_dir, tmp_path / "published")))
    upcycle_folder(folder, tmp_path / "mtu", PAPER_TASKS, num_experts=2, d_task=8, router_width=8)
    assert not [*(tmp_path / "mtu").rglob("*.bin"), *(tmp_path / "mtu").glob("*.safetensors")]
    whole = load_as_task(sdxl_pipeline_dir, "t2i")
    sharded = MTUPipeline.from_pretrained(tmp_path / "mtu")
    options: dict[str, Any] = {"task": "t2i", "num_inference_steps": 2, "latents": noise(), "output_type": "latent"}
    options["guidance_scale"] = 5.0
    assert apart(sharded("a cat", **options).latents, whole("a cat", **options).latents) < 1e-4


def _change(part: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / part
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_change("model_index.json", requires_aesthetics_score=True), "requires_aesthetics_score is true"),
        (_change("model_index.json", force_zeros_for_empty_prompt="yes"), 'force_zeros_for_empty_prompt is "yes"'),
        (_change("model_index.json", tokenizer_2=[None, None]), "does not list tokenizer_2"),
        (_change("unet/config.json", addition_embed_type=None), "addition_embed_type is null"),
        (_change("unet/config.json", addition_time_embed_dim=16), "projection_class_embeddings_input_dim is 80"),
        (_change("unet/config.json", cross_attention_dim=12), "cross_attention_dim is 12, expected 32, the sum"),
        (_change("tokenizer_2/tokenizer_config.json", model_max_length=12), "model_max_length is 12, expected 16"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    sdxl_pipeline_dir: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    folder = Path(shutil.copytree(sdxl_pipeline_dir, tmp_path / "base"))
    change(folder)
    with pytest.raises(ModelError) as error:
        check_folder(folder)
    assert said in error.value.message and str(folder) in error.value.message


def test_sizes_are_refused_where_they_mean_nothing(sdxl_pipeline_dir: Path, base_pipeline_dir: Path) -> None:
    with pytest.raises(ConfigError, match="Stable Diffusion is told no target_size"):
        load_as_task(base_pipeline_dir, "t2i")("a", task="t2i", target_size=(8, 8))
    with pytest.raises(ConfigError, match=r"original_size\[0\] is 0"):
        load_as_task(sdxl_pipeline_dir, "t2i")("a", task="t2i", original_size=(0, 8))


def test_the_autoencoder_stays_in_float32_where_half_is_too_small(sdxl_mtu_dir: Path, mtu_pipeline_dir: Path) -> None:
    half = MTUPipeline.from_pretrained(sdxl_mtu_dir, torch_dtype=torch.float16)
    assert (half.unet.dtype, half.vae.dtype) == (torch.float16, torch.float32)
    assert MTUPipeline.from_pretrained(mtu_pipeline_dir, torch_dtype=torch.float16).vae.dtype == torch.float16


def test_it_trains(sdxl_mtu_dir: Path, tmp_path: Path) -> None:
    from mtu_compile.model.train import train
    from mtu_compile.model.train_config import TrainConfig

    rng = np.random.default_rng(0)
    for task in ("t2i", "edit"):
        (tmp_path / "data" / task).mkdir(parents=True)
        rows = []
        for i in range(4):
            for kind in ("target", "source"):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / task / f"{kind}{i}.png")
            rows.append({"prompt": "abc"[: i + 1], "file_name": f"target{i}.png", "image_file_name": f"source{i}.png"})
        (tmp_path / "data" / task / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = TrainConfig(
        model=sdxl_mtu_dir,
        data=tmp_path / "data",
        output=tmp_path / "out",
        steps=2,
        batch_size=2,
        tasks=("t2i", "edit"),
        cpu=True,
    )
    result = train(config)
    assert result.finished and all(np.isfinite(loss) for loss in result.losses.values())
    before, after = (MTUPipeline.from_pretrained(folder).unet for folder in (sdxl_mtu_dir, result.output))
    trained = [name for name, one in before.named_parameters() if not torch.equal(one, after.get_parameter(name))]
    assert any(".ff.experts." in name for name in trained) and any("task_conv_in" in name for name in trained)
    assert not any("attn" in name or "add_embedding" in name for name in trained)
