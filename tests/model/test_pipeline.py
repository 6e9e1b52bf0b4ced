"""The multi-task pipeline: conditions and guidance by hand, its parts by diffusers, and what it refuses to load."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from PIL import Image

from calibration.record import record_reference
from calibration.samples import Sample
from mtu_compile.accuracy.pictures import changed_region
from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.rows import Row
from mtu_compile.core.tasks import PAPER_TASKS, Task
from mtu_compile.model import encode
from mtu_compile.model.data import Encoder
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.upcycle import upcycle_folder
from mtu_compile.runtime import images
from mtu_compile.runtime.fitting import Frame


@pytest.fixture(scope="module")
def pipeline(mtu_pipeline_dir: Path, tiny_mtu: Any) -> MTUPipeline:
    """A pipeline whose tasks really differ."""
    return MTUPipeline.from_pretrained(mtu_pipeline_dir, unet=tiny_mtu())


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    rng = np.random.default_rng(5)
    return Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 20))
    return mask


def calls_of(pipeline: MTUPipeline, *args: Any, **options: Any) -> tuple[list[dict[str, Any]], list[Any], Any]:
    inputs, outputs = [], []

    def keep(call: dict[str, Any], output: Any, timestep: float) -> None:
        assert timestep == float(call["timestep"])
        inputs.append(call)
        outputs.append(output)

    result = pipeline(*args, num_inference_steps=4, on_unet_call=keep, **options)
    return inputs, outputs, result


def test_upcycled_text_to_image_is_stable_diffusions(base_pipeline_dir: Path, mtu_pipeline_dir: Path) -> None:
    """Not only the UNet: prompt, guidance, scheduler and decoding are those of the pretrained pipeline."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = StableDiffusionPipeline.from_pretrained(
            base_pipeline_dir, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    base.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = base("ab", num_inference_steps=5, guidance_scale=7.5, latents=noise.clone(), output_type="np").images
    ours = MTUPipeline.from_pretrained(mtu_pipeline_dir)
    actual = ours("ab", task="t2i", num_inference_steps=5, latents=noise.clone(), output_type="np").images
    assert np.abs(actual - expected).max() < 1e-4


def test_conditions_and_guidance_by_hand(pipeline: MTUPipeline, picture: Image.Image, mask: Image.Image) -> None:
    vae, scaling = pipeline.vae, pipeline.vae.config.scaling_factor

    def encoded(pixels: np.ndarray[Any, Any]) -> Any:
        tensor = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.no_grad():
            return vae.encode(tensor).latent_dist.mean * scaling

    pixels = np.asarray(picture).astype(np.float32)
    selected = np.asarray(mask) > 0
    grey = np.where(selected[..., None], 127.5, pixels)
    mask_latent = torch.zeros(1, 1, 8, 8)
    mask_latent[:, :, 2:5, 2:6] = 1
    expected = {
        "t2i": (None, 2),
        "edit": (encoded(pixels), 3),
        "sr": (encoded(pixels), 1),
        "inpaint": (torch.cat([mask_latent, encoded(grey)], dim=1), 3),
    }
    for task in PAPER_TASKS:
        condition, batch = expected[task.name]
        inputs, outputs, result = calls_of(
            pipeline, "cat", task=task.name, image=picture, mask_image=mask, seed=3, guidance_scale=3.0,
            image_guidance_scale=1.5,
        )  # fmt: skip
        noise = np.random.Generator(np.random.PCG64(3)).standard_normal((1, 4, 8, 8), dtype=np.float32)
        assert np.array_equal(inputs[0]["sample"][:1, :4].numpy(), noise)
        x = torch.from_numpy(noise)
        pipeline.scheduler.set_timesteps(4)
        for call, output, t in zip(inputs, outputs, pipeline.scheduler.timesteps, strict=True):
            assert call.keys() == {"sample", "timestep", "encoder_hidden_states"}
            assert call["timestep"].shape == (1,) and call["sample"].shape[0] == output.shape[0] == batch
            assert torch.allclose(call["sample"][:, :4], x.expand(batch, -1, -1, -1), atol=1e-5)
            if condition is None:
                assert call["sample"].shape[1] == 4
            else:
                first = torch.zeros_like(condition) if batch == 3 else condition
                assert torch.allclose(call["sample"][0, 4:], first[0], atol=1e-5)
                assert torch.allclose(call["sample"][-1, 4:], condition[0], atol=1e-5)
            e = output
            guided = {
                1: lambda e=e: e[:1],
                2: lambda e=e: e[:1] + 3.0 * (e[1:] - e[:1]),
                3: lambda e=e: e[:1] + 1.5 * (e[1:2] - e[:1]) + 3.0 * (e[2:] - e[1:2]),
            }[batch]()
            x = pipeline.scheduler.step(guided, t, x).prev_sample
        assert torch.allclose(result.latents, x, atol=1e-4)


def test_text_rows_are_empty_prompt_then_prompt(pipeline: MTUPipeline, picture: Image.Image) -> None:
    (plain, *_), _, _ = calls_of(pipeline, "cat", task="edit", image=picture, seed=0)
    (negative, *_), _, _ = calls_of(pipeline, "cat", task="edit", image=picture, seed=0, negative_prompt="dog")
    text, other = plain["encoder_hidden_states"], negative["encoder_hidden_states"]
    assert torch.equal(text[0], text[1]) and not torch.equal(text[1], text[2])
    assert torch.equal(other[2], text[2]) and not torch.equal(other[0], text[0])


def test_the_tasks_own_guidance_is_the_default(pipeline: MTUPipeline, picture: Image.Image) -> None:
    edit = PAPER_TASKS[1]
    scales = {"guidance_scale": edit.guidance_scale, "image_guidance_scale": edit.image_guidance_scale}
    default = pipeline("cat", task="edit", image=picture, seed=0, num_inference_steps=2, output_type="latent").latents
    options = {"task": "edit", "image": picture, "seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(pipeline("cat", **options, **scales).latents, default)
    assert not torch.equal(pipeline("cat", **options, guidance_scale=1.0).latents, default)


def test_unmasked_pixels_come_from_the_picture(pipeline: MTUPipeline, picture: Image.Image, mask: Image.Image) -> None:
    options: dict[str, Any] = {"task": "inpaint", "image": picture, "mask_image": mask, "num_inference_steps": 2}
    made = np.asarray(pipeline("cat", **options, seed=0).images[0]).astype(int)
    free = np.asarray(pipeline("cat", **options, seed=0, paste_unmasked=False).images[0]).astype(int)
    outside = np.asarray(mask) == 0
    assert np.abs(made - np.asarray(picture))[outside].max() <= 1
    assert np.abs(free - np.asarray(picture))[outside].max() > 10
    assert np.array_equal(made[~outside], free[~outside])


def test_small_and_transparent_pictures_become_what_the_vae_sees(pipeline: MTUPipeline, picture: Image.Image) -> None:
    small = picture.resize((8, 8))
    large = small.resize((32, 32), Image.Resampling.BICUBIC)
    options: dict[str, Any] = {"task": "sr", "seed": 0, "num_inference_steps": 2, "output_type": "latent"}
    assert torch.equal(pipeline(image=small, **options).latents, pipeline(image=large, **options).latents)
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    white = Image.new("RGB", (32, 32), "white")
    assert torch.equal(pipeline(image=clear, **options).latents, pipeline(image=white, **options).latents)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_both_predictions_recover_the_picture_a_perfect_network_knows(
    pipeline: MTUPipeline, monkeypatch: pytest.MonkeyPatch, prediction: str
) -> None:
    """A UNet that answers with the truth brings the sampler to the one picture it knows."""
    from diffusers import DDIMScheduler

    config = {**pipeline.scheduler.config, "prediction_type": prediction, "rescale_betas_zero_snr": True}
    scheduler = DDIMScheduler.from_config({**config, "rescale_betas_zero_snr": prediction == "v_prediction"})
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    truth = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))

    def oracle(sample: Any, timestep: Any, **_: Any) -> Any:
        abar = scheduler.alphas_cumprod[int(timestep)]
        noise = (sample[:, :4] - abar.sqrt() * truth) / (1 - abar).sqrt()
        target = noise if prediction == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * truth
        return (target,)

    monkeypatch.setattr(pipeline.unet, "forward", oracle)
    made = pipeline(task="t2i", seed=0, num_inference_steps=8, output_type="latent").latents
    assert torch.allclose(made, truth, atol=1e-3)


def test_a_seed_repeats_and_noise_can_be_given(pipeline: MTUPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"task": "t2i", "num_inference_steps": 3, "output_type": "latent"}
    for scheduler in (DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler):
        monkeypatch.setattr(pipeline, "scheduler", scheduler.from_config(pipeline.scheduler.config))
        first = pipeline("a", seed=4, **options).latents
        assert torch.equal(pipeline("a", seed=4, **options).latents, first)
        assert not torch.equal(pipeline("a", seed=5, **options).latents, first)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(pipeline, "scheduler", DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config))
    drawn = pipeline("a", generator=generator, **options).latents
    assert torch.equal(pipeline("a", latents=noise, **options).latents, drawn)


def test_other_sizes(pipeline: MTUPipeline, picture: Image.Image) -> None:
    made = pipeline(task="sr", image=picture, height=48, width=24, num_inference_steps=1, seed=0).images[0]
    assert made.size == (24, 48)
    assert pipeline.resolve_size() == (32, 32)
    for size in ({"height": 30}, {"width": -8}, {"height": 4}):
        with pytest.raises(ConfigError, match="not a size"):
            pipeline(task="t2i", **size)


def test_missing_inputs_and_unknown_tasks_are_named(pipeline: MTUPipeline, picture: Image.Image) -> None:
    with pytest.raises(ConfigError, match="dance") as error:
        pipeline(task="dance")
    assert error.value.hint and "t2i, edit, sr, inpaint" in error.value.hint
    with pytest.raises(ConfigError, match="'edit' needs a source picture"):
        pipeline(task="edit")
    with pytest.raises(ConfigError, match="'inpaint' needs a mask"):
        pipeline(task="inpaint", image=picture)
    with pytest.raises(ConfigError, match="latents"):
        pipeline(task="t2i", latents=torch.zeros(1, 4, 4, 4))


def test_a_fifth_task_needs_only_data(base_pipeline_dir: Path, tmp_path: Path, picture: Image.Image) -> None:
    tasks = (*PAPER_TASKS, Task("outpaint-sketch", ("mask", "image", "masked_image"), "text", 2.0))
    upcycle_folder(base_pipeline_dir, tmp_path / "mtu", tasks, num_experts=2, d_task=8, router_width=8)
    pipeline = MTUPipeline.from_pretrained(tmp_path / "mtu")
    inputs, _, result = calls_of(
        pipeline, "cat", task="outpaint-sketch", image=picture, mask_image=Image.new("L", (32, 32), 255), seed=0
    )
    assert inputs[0]["sample"].shape == (2, 13, 8, 8)
    # With this guidance the condition stays in both parts, and the whole picture is masked.
    assert torch.equal(inputs[0]["sample"][0, 4:], inputs[0]["sample"][1, 4:])
    assert (inputs[0]["sample"][:, 4] == 1).all()
    assert result.images[0].size == (32, 32)


def test_a_saved_pipeline_comes_back_the_same(pipeline: MTUPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    again = MTUPipeline.from_pretrained(tmp_path / "saved")
    options: dict[str, Any] = {"task": "t2i", "seed": 0, "num_inference_steps": 2}
    assert torch.equal(again("a", **options).latents, pipeline("a", **options).latents)
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["unet"] == ["mtu_compile.model.unet", "MTUUNet2DConditionModel"]


def test_half_precision_networks_keep_float_latents(pipeline: MTUPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    half = MTUPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    inputs, outputs, result = calls_of(half, "a", task="t2i", seed=0)
    assert inputs[0]["sample"].dtype == outputs[0].dtype == torch.bfloat16
    assert result.latents.dtype == torch.float32


def test_a_plain_pipeline_says_how_to_upcycle_it(base_pipeline_dir: Path) -> None:
    with pytest.raises(ModelError, match="not multi-task") as error:
        MTUPipeline.from_pretrained(base_pipeline_dir)
    assert error.value.hint and "mtu-compile upcycle" in error.value.hint


def test_code_in_the_folder_is_never_run(
    mtu_pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mtu"
    shutil.copytree(mtu_pipeline_dir, folder)
    trap = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"
    for place in (folder, folder / "unet", folder / "scheduler", folder / "text_encoder"):
        for name in ("pipeline.py", "unet.py", "modeling.py"):
            (place / name).write_text(trap)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.Evil"}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["pipeline", "Evil"]}))
    MTUPipeline.from_pretrained(folder)
    for name, value in {"scheduler": ["scheduler", "Evil"], "vae": ["unet", "Evil"], "unet": ["unet", "Evil"]}.items():
        (folder / "model_index.json").write_text(json.dumps({**index, name: value}))
        with pytest.raises(ModelError, match="Evil"):
            MTUPipeline.from_pretrained(folder)
    assert not list(folder.rglob("*.ran"))


def test_damage_anywhere_is_a_model_error(mtu_pipeline_dir: Path, tmp_path: Path) -> None:
    for victim in sorted(path.relative_to(mtu_pipeline_dir) for path in mtu_pipeline_dir.rglob("*") if path.is_file()):
        folder = tmp_path / str(victim).replace("/", "_")
        shutil.copytree(mtu_pipeline_dir, folder)
        content = (folder / victim).read_bytes()
        (folder / victim).write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelError) as error:
            MTUPipeline.from_pretrained(folder)
        assert (
            error.value.exit_code == 5 and str(victim.parent if victim.parent.name else victim) in error.value.message
        )


def test_casting_the_unet_says_nothing(tiny_mtu: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert tiny_mtu().to(torch.float64).dtype == torch.float64
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_pictures_of_other_proportions_are_fitted_as_the_runtime_and_training_do_it(
    pipeline: MTUPipeline, tmp_path: Path, fit: Any
) -> None:
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 64, 3), dtype=np.uint8))
    hole = Image.new("L", (64, 32))
    hole.paste(255, (20, 0, 40, 16))
    (first, *_), _, result = calls_of(pipeline, "cat", task="inpaint", image=wide, mask_image=hole, seed=0, fit=fit)
    frame = Frame.of((64, 32), (32, 32), fit)
    selected = frame.mask(hole)
    expected = torch.from_numpy(images.shrink_mask(selected, (8, 8)))
    torch.testing.assert_close(first["sample"][1, 4], expected)
    unmasked = images.to_array(frame.picture(wide)) * (1 - selected)
    torch.testing.assert_close(
        first["sample"][1, 5:], encode.encode_pixels(pipeline.vae, torch.from_numpy(unmasked))[0]
    )
    assert np.array_equal(np.asarray(result.images[0])[selected == 0], np.asarray(frame.picture(wide))[selected == 0])
    assert result.notices == ()

    wide.save(tmp_path / "wide.png")
    hole.save(tmp_path / "hole.png")
    row = Row("here", "cat", target=tmp_path / "wide.png", mask=tmp_path / "hole.png")
    encoder = Encoder(pipeline.vae, pipeline.texts, height=32, width=32, mask_variants=1, seed=0, fit=fit)
    task = next(task for task in pipeline.unet.tasks if task.name == "inpaint")
    torch.testing.assert_close(encoder.conditions(task, [row], [0])[0], first["sample"][1, 4:])
    torch.testing.assert_close(
        encoder.picture(row.target)[None], torch.from_numpy(images.to_array(frame.picture(wide)))
    )


def test_the_reference_is_made_and_judged_with_one_fit(pipeline: MTUPipeline) -> None:
    wide = Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 64, 3), dtype=np.uint8))
    hole = Image.new("L", (64, 32))
    hole.paste(255, (20, 0, 40, 16))
    task = next(task for task in pipeline.unet.tasks if task.name == "inpaint")
    sample = Sample("cat", wide, hole, target=wide)
    regions = []
    for fit in ("crop", "pad", "stretch"):
        recorded = record_reference(pipeline, task, [sample], size=(32, 32), steps=1, fit=fit, producer="a test")
        (one,) = recorded.trajectories
        region = changed_region(one, task, fit)
        assert region is not None and one.target is not None
        seen = one.inputs[0]["sample"][1, 4]
        np.testing.assert_array_equal(images.shrink_mask(region.inside.astype(np.float32), (8, 8)), seen)
        np.testing.assert_array_equal(region.source, one.target)
        regions.append(region.inside.tobytes())
    assert len(set(regions)) == 3


def test_what_may_not_be_meant_is_in_the_result(pipeline: MTUPipeline, picture: Image.Image) -> None:
    made = pipeline(
        "a very long prompt that is cut",
        task="inpaint",
        image=picture,
        mask_image=Image.new("L", (8, 8)),
        negative_prompt="fine",
        num_inference_steps=1,
        seed=0,
    )
    assert [notice.kind for notice in made.notices] == ["mask-empty", "prompt-cut"]
    with pytest.raises(ConfigError, match="is not a seed"):
        pipeline("a cat", task="t2i", seed=-1)
