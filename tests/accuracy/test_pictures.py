"""Metrics of pictures: known values, and what each of them sees that the others do not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mtu_compile.accuracy.formulas import colour_difference
from mtu_compile.accuracy.host.perceptual import ClipModel, perceptual, vif
from mtu_compile.accuracy.measuring import measure_picture
from mtu_compile.accuracy.pictures import Perceptual, changed_region, truth_metrics
from mtu_compile.accuracy.summary import summarise
from mtu_compile.accuracy.task_metrics import PictureMetrics, TaskMetrics
from mtu_compile.accuracy.thresholds import Thresholds
from mtu_compile.accuracy.verdict import TaskCheck
from mtu_compile.core.errors import AccuracyError, ConfigError, ModelError
from mtu_compile.core.tasks import PAPER_TASKS, Task
from mtu_compile.runtime import Result
from mtu_compile.runtime.reference import Reference, Trajectory

T2I, EDIT, SR, INPAINT = PAPER_TASKS
SIDE = 64


def scene(seed: int = 0) -> Image.Image:
    """Blocks of colour with fine grain."""
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.integers(40, 216, (8, 8, 3)), np.ones((8, 8, 1)))
    return Image.fromarray((blocks + rng.integers(-20, 21, (SIDE, SIDE, 3))).astype(np.uint8))


def shifted(picture: Image.Image, by: int, where: Any = np.s_[:, :]) -> Image.Image:
    """``by`` added to every channel of a part of a picture."""
    array = np.asarray(picture).astype(int)
    array[where] += by
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


def trajectory(picture: Image.Image, **more: Any) -> Trajectory:
    latents = np.arange(4 * 8 * 8, dtype=np.float32).reshape(1, 4, 8, 8)
    step = {"timestep": np.array([500], np.float32)}
    outputs = np.zeros((1, 1, 4, 8, 8), np.float32)
    given = {"prompt": "a cat", "seed": 0, "image": None, "mask": None, **more}
    return Trajectory(inputs=[step], outputs=outputs, noise=latents, latents=latents, picture=picture, **given)


def measure(one: Trajectory, picture: Image.Image, task: Task = T2I, measures: Perceptual | None = None) -> Any:
    return measure_picture(one, Result(picture, one.latents), task, measures or Perceptual())


def test_an_equal_picture_is_perfect_by_every_metric() -> None:
    one = trajectory(scene(), image=scene(1), target=scene())
    metrics = measure(one, scene(), EDIT, perceptual())
    values = metrics.values
    assert (values["latent_psnr_db"], values["image_psnr_db"], values["colour_difference"]) == (200, 200, 0)
    assert values["ssim"] == pytest.approx(1) and values["vif"] == pytest.approx(1, abs=1e-6)
    assert values["truth_drop_db"] == 0
    assert metrics.region is not None and metrics.region.inside_psnr_db == 200
    assert metrics.truth is not None and (metrics.truth.psnr_db, metrics.truth.drop_db) == (200, 0)


def test_vif_is_that_of_its_authors_and_sees_blur_that_ssim_forgives() -> None:
    picture = scene()
    array = np.asarray(picture)
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)))
    assert vif(array, array) == pytest.approx(1, abs=1e-6)
    assert vif(array, np.full_like(array, 128)) == pytest.approx(0, abs=1e-6)
    seen = vif(array, blurred)
    assert seen is not None and 0.02 < seen < 0.5
    # More contrast is more information: the one metric of its kind that can exceed 1 (Sheikh & Bovik, section IV).
    stretched = np.clip((array.astype(float) - 128) * 1.15 + 128, 0, 255).astype(np.uint8)
    enhanced = vif(array, stretched)
    assert enhanced is not None and enhanced > 1
    assert vif(np.full_like(array, 128), array) is None
    assert vif(array[:40], array[:40]) is None


def test_colour_difference_is_ciede2000_and_sees_a_tint() -> None:
    black, white, grey = (np.full((16, 16, 3), level, np.uint8) for level in (0, 255, 128))
    assert colour_difference(black, white) == pytest.approx(100, abs=0.01)
    tinted = grey.copy()
    tinted[..., 0] += 40
    seen = colour_difference(grey, tinted)
    assert seen is not None and seen > 10


def test_inside_and_outside_of_a_mask_are_measured_apart() -> None:
    """Inside 51 levels too bright, 0.2 of the range: 13.98 dB; outside untouched."""
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE, 16))
    picture = Image.new("RGB", (SIDE, SIDE), (100, 100, 100))
    source = Image.new("RGB", (SIDE, SIDE), (100, 100, 151))
    one = trajectory(picture, image=source, mask=mask)
    region = measure(one, shifted(picture, 51, np.s_[:16]), INPAINT).region
    assert (region.kind, region.inside_pixels, region.outside_pixels) == ("mask", 16 * SIDE, 48 * SIDE)
    assert region.inside_psnr_db == pytest.approx(20 * math.log10(5))
    assert region.outside_psnr_db == 200
    # Blue alone is 0.2 off the source, before and after.
    same = pytest.approx(20 * math.log10(5) + 10 * math.log10(3))
    assert (region.source_psnr_db, region.reference_source_psnr_db) == (same, same)
    spoilt = measure(one, shifted(picture, 51, np.s_[16:]), INPAINT).region
    assert (spoilt.inside_psnr_db, spoilt.outside_psnr_db) == (200, pytest.approx(20 * math.log10(5)))
    assert spoilt.source_psnr_db < region.source_psnr_db


def test_the_region_of_an_edit_is_where_the_float_original_changed_the_source() -> None:
    source = scene()
    noisy = shifted(source, 12)  # an autoencoder's error is no edit
    edited = shifted(noisy, 60, np.s_[20:30, 20:30])
    one = trajectory(edited, image=source)
    region = changed_region(one, EDIT)
    assert region is not None and region.kind == "edit"
    rows, columns = np.nonzero(region.inside)
    reach = 2  # 3 % of 64 pixels
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20 - reach, 29 + reach, 20 - reach, 29 + reach)
    measured = measure(one, shifted(edited, 51, np.s_[40:]), EDIT).region
    assert measured.inside_psnr_db == 200 and 13 < measured.outside_psnr_db < 20
    assert measured.source_psnr_db < measured.reference_source_psnr_db - 5
    # A picture of another size than the output's is fitted to it first.
    larger = trajectory(edited, image=source.resize((128, 128), Image.Resampling.NEAREST))
    assert changed_region(larger, EDIT) is not None


@pytest.mark.parametrize(
    ("task", "given", "kind"),
    [
        (T2I, {}, None),
        (SR, {"image": scene().reduce(4)}, None),
        (EDIT, {"image": scene()}, "edit"),
        (INPAINT, {"image": scene(), "mask": Image.new("L", (SIDE, SIDE), 255)}, "mask"),
        (Task("colourise", ("image",), "text"), {"image": scene()}, "edit"),
        (Task("erase", ("mask", "masked_image"), "none"), {"image": scene(), "mask": Image.new("L", (9, 9))}, "mask"),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else "",
)
def test_what_is_measured_follows_from_the_tasks_description(task: Task, given: Any, kind: str | None) -> None:
    region = changed_region(trajectory(scene(), **given), task)
    assert (None if region is None else region.kind) == kind


def test_a_mask_that_covers_everything_leaves_nothing_outside() -> None:
    one = trajectory(scene(), image=scene(1), mask=Image.new("L", (SIDE, SIDE), 255))
    metrics = measure(one, shifted(scene(), 10), INPAINT)
    assert metrics.region.outside_psnr_db is None and metrics.region.source_psnr_db is None
    task = summarise(TaskMetrics((), (metrics,)))
    assert task["outside_psnr_db"] is None
    assert task["inside_psnr_db"] == pytest.approx(metrics.region.inside_psnr_db)


def test_the_drop_against_the_truth_is_the_floats_psnr_minus_the_candidates() -> None:
    """Float 0.1 of the range off, candidate 0.2: 6.02 dB."""
    truth = np.full((16, 16, 3), 0.5)
    metrics = truth_metrics(truth, truth + 0.1, truth + 0.2)
    assert metrics.reference_psnr_db == pytest.approx(20) and metrics.psnr_db == pytest.approx(20 - 6.0206)
    assert metrics.drop_db == pytest.approx(6.0206, abs=1e-4)
    assert truth_metrics(truth, truth + 0.2, truth + 0.1).drop_db < 0


def test_the_means_of_a_task_pool_regions_by_their_errors() -> None:
    """A picture without any difference must not hide one that is spoilt: 14 and 200 dB make 17, not 107."""
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, 32, SIDE))
    one = trajectory(Image.new("RGB", (SIDE, SIDE), (100, 100, 100)), image=scene(), mask=mask, target=scene(1))
    equal = measure(one, one.picture, INPAINT)
    spoilt = measure(one, shifted(one.picture, 51), INPAINT)
    task = TaskCheck(TaskMetrics((), (equal, spoilt)), Thresholds({}), 2, ()).summary()
    assert task["outside_psnr_db"] == pytest.approx(20 * math.log10(5) + 10 * math.log10(2), abs=1e-6)
    assert task["image_psnr_db"] == pytest.approx((200 + 20 * math.log10(5)) / 2)
    assert task["region"]["share"] == pytest.approx(0.5) and task["region"]["kind"] == "mask"
    assert task["truth"] is not None and task["truth_drop_db"] == pytest.approx(spoilt.truth.drop_db / 2)
    json.dumps(task, allow_nan=False)


def test_pictures_of_other_sizes_are_refused() -> None:
    with pytest.raises(AccuracyError, match="shapes"):
        measure(trajectory(scene()), scene().reduce(2))


def test_means_without_any_measurement_are_none() -> None:
    task = summarise(TaskMetrics((), (PictureMetrics({"latent_psnr_db": 30.0, "image_psnr_db": 30.0}),)))
    assert (task["ssim"], task["vif"], task["inside_psnr_db"], task["truth_drop_db"]) == (None,) * 4
    assert (task["region"], task["truth"], task["clip"]) == (None, None, None)


def test_a_reference_keeps_the_wanted_picture_and_older_ones_have_none(tmp_path: Path) -> None:
    one = trajectory(scene(), target=scene(1))
    old = replace(one, target=None)
    Reference("edit", 1, "a test", (one, old)).save(tmp_path / "reference.safetensors")
    first, second = Reference.load(tmp_path / "reference.safetensors").trajectories
    assert first.target is not None and np.array_equal(np.asarray(first.target), np.asarray(scene(1)))
    assert second.target is None and np.array_equal(np.asarray(second.picture), np.asarray(scene()))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, base_pipeline_dir: Path) -> Path:
    """A CLIP model of random weights as transformers saves it."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 54, "max_position_embeddings": 16, "eos_token_id": 53, "bos_token_id": 52}
    config = CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    for file in (base_pipeline_dir / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


def test_a_clip_model_compares_pictures_and_prompt(clip_folder: Path) -> None:
    clip = ClipModel(clip_folder)
    same = clip(scene(), scene(), "a cat")
    # A CPU may sum up the two rows of a batch in different orders: the eighth digit is its own.
    assert same.image == pytest.approx(1, abs=1e-5) and same.text == pytest.approx(same.reference_text, abs=1e-5)
    other = clip(scene(), scene(1), "a cat")
    assert other.image < 0.9999 and other.reference_text == pytest.approx(same.text, abs=1e-5)
    assert other.text is not None and -1 <= other.text <= 1 and abs(other.text - other.reference_text) > 1e-4
    assert clip(scene(), scene(), " ").text is None
    assert clip(scene(), scene(), "a very long prompt " * 20).text is not None
    measured = measure(trajectory(scene()), scene(1), T2I, perceptual(clip_folder))
    assert measured.clip is not None
    assert asdict(measured.clip) == pytest.approx(asdict(other), abs=1e-5)
    assert summarise(TaskMetrics((), (measured,)))["clip"] == asdict(measured.clip)


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_a_pickle(folder: Path) -> None:
    import torch

    without_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [without_weights, with_a_pickle, truncated, without_config])
def test_a_folder_that_is_no_clip_model_is_refused(
    damage: Callable[[Path], None], clip_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    damage(folder)
    with pytest.raises(ModelError, match="not a CLIP model"):
        ClipModel(folder)


def test_a_clip_model_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        perceptual(tmp_path / "openai" / "clip-vit-base-patch32")
