"""Further emoji sets keep held-out emoji out, and their batches are what the four tasks' pipelines are given."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from examples.emoji import data, further
from examples.emoji.gpu import further as more
from examples.emoji.gpu import pools
from examples.emoji.gpu.prompts import damaged
from examples.emoji.gpu.setting import Setting
from examples.emoji.train_further import Further
from mtu_compile.core.tasks import Task
from mtu_compile.model.pipeline import MTUPipeline

CPU = torch.device("cpu")
MODEL = Path(__file__).parents[2] / "examples" / "emoji" / "model"
TASKS = [Task.from_json(row) for row in json.loads((MODEL.parent / "tasks.json").read_text())]
KNOWN = "thumbs up"
HELD_OUT = next(name for name in map("thing {}".format, range(100)) if data.is_held_out(name))


def smooth(seed: int) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((64, 64), Image.Resampling.BICUBIC))


def package(cache: Path, one: further.EmojiSet, rows: list[dict[str, Any]], pictures: list[np.ndarray]) -> None:
    """An npm archive with the pictures in one line of the sheet; tones follow their row."""
    border = (one.cell - data.SIZE) // 2
    sheet = np.full((one.cell, one.cell * len(pictures), 3), 255, np.uint8)
    cells = [cell for row in rows for cell in (row, *row.get("skin_variations", {}).values())]
    for i, (cell, pixels) in enumerate(zip(cells, pictures, strict=True)):
        cell |= {"sheet_x": i, "sheet_y": 0, f"has_img_{one.vendor}": cell.get(f"has_img_{one.vendor}", True)}
        sheet[border : border + 64, i * one.cell + border : i * one.cell + border + 64] = pixels
    png = io.BytesIO()
    Image.fromarray(sheet).save(png, "PNG")
    with tarfile.open(cache / f"{one.package.replace('@', '-')}.tgz", "w:gz") as archive:
        files = {data.TABLE: json.dumps(rows).encode(), data.SHEET.format(vendor=one.vendor): png.getvalue()}
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def row(name: str, unified: str, *tones: str, **more: Any) -> dict[str, Any]:
    variants = {tone: {"unified": f"{unified}-{tone}"} for tone in tones}
    kind = {"category": "People & Body", "subcategory": "hand", "short_name": name, "short_names": [name]}
    return {"name": name.upper(), "unified": unified, "skin_variations": variants, **kind, **more}


def test_a_set_has_no_held_out_emoji_and_no_picture_twice(tmp_path: Path) -> None:
    today = further.EmojiSet(*data.PACKAGE.removeprefix("emoji-datasource-").split("@"))
    package(tmp_path, today, [row(KNOWN, "A", "1F3FB"), row(HELD_OUT, "B")], [smooth(i) for i in range(3)])
    other = further.EmojiSet("twitter", "1.0", cell=64)
    nearly = np.clip(smooth(2).astype(int) + 9, 0, 255).astype(np.uint8)
    rows = [
        row("hand of old", "A", "1F3FB", "1F3FC"),  # a name of its own; the last tone is unknown today
        row("some other name", "B"),  # held out by today's name
        row(KNOWN, "A"),  # near the held-out picture
        row("another's", "A", has_img_twitter=False),  # a fallback, drawn by somebody else
        row("unheard of", "C"),
    ]
    package(tmp_path, other, rows, [smooth(0), smooth(11), smooth(12), smooth(13), nearly, smooth(14), smooth(15)])

    everything = data.load(tmp_path)
    assert [(e.base, e.tone, e.held_out) for e in everything] == [
        (KNOWN, None, False),
        (KNOWN, "light skin tone", False),
        (HELD_OUT, None, True),
    ]
    (found,) = further.load(tmp_path, everything, [other])
    assert [(e.base, e.tone) for e in found] == [(KNOWN, "light skin tone")]
    assert np.array_equal(found[0].pixels, smooth(11))


def test_every_set_of_the_recipe_names_a_package() -> None:
    assert len({one.package for one in further.SETS}) == len(further.SETS)
    assert data.PACKAGE not in {one.package for one in further.SETS}


def pixels_as_latents(x: Tensor) -> Any:
    """An autoencoder whose latents can be looked at: colours in three channels, their mean in the fourth."""
    small = F.avg_pool2d(x, 4)
    return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.cat((small, small.mean(1, True)), 1)))


VAE = SimpleNamespace(encode=pixels_as_latents, config=SimpleNamespace(scaling_factor=1.0, latent_channels=4))


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """32 examples of each task, from pictures that are the same in every tone."""

    def picture(base: str, tone: str | None, seed: int) -> data.Emoji:
        return data.Emoji(base, tone, True, False, smooth(seed), "People & Body")

    tones = (None, *data.TONES.values())
    today = [picture(base, tone, seed) for seed, base in enumerate((KNOWN, "ear", "nose")) for tone in tones]
    other = [picture(KNOWN, tone, 9) for tone in tones]
    setting = Setting(device=CPU, batch={"tasks": 128}, variants=4)
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL / "tokenizer")
    made = more.FurtherData(TASKS, [32] * 4, today, [other], tokenizer, VAE, setting)
    with torch.autocast("cpu", enabled=False):
        return made()


def test_batches_hold_the_tasks_one_after_the_other(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    clean, condition, ids = drawn
    assert clean.shape == (128, 4, 16, 16) and condition.shape == (128, 5, 16, 16) and len(ids) == 128
    assert not condition[:32].any()  # text-to-image
    assert not condition[32:96, 4].any()  # one channel narrower than inpainting
    assert (ids[64:96] == ids[64]).all()  # super-resolution has no prompt


def test_source_and_target_of_an_edit_are_changed_alike(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    clean, condition = drawn[0][32:64], drawn[1][32:64, :4]
    kept = condition.flatten(1).abs().sum(1) > 0
    assert kept.sum() > 20  # the rest lost its condition for guidance
    torch.testing.assert_close(condition[kept], clean[kept])


def test_only_the_hole_of_an_inpainting_example_is_hidden(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    clean, (mask, hidden) = drawn[0][96:], drawn[1][96:].split((1, 4), dim=1)
    kept = mask.flatten(1).any(1)
    whole = F.avg_pool2d(mask, 3, 1, 1) == 0  # away from the edge of the hole
    away = (whole & kept[:, None, None, None]).expand_as(clean)
    assert away.any()
    torch.testing.assert_close(hidden[away], clean[away], atol=0.02, rtol=0)
    inside = ((-F.max_pool2d(-mask, 3, 1, 1)) == 1).expand_as(clean)
    assert (hidden[inside].abs() < 0.02).float().mean() > 0.95  # a stroke may leave a gap thinner than a latent


def test_a_plain_change_changes_nothing_and_another_does() -> None:
    pictures = pools.Pictures(np.stack([smooth(0)] * 64), CPU)
    index = torch.arange(64)
    as_it_is = pictures.variant(index, pools.Variant())
    torch.manual_seed(0)
    assert torch.equal(pictures.take(index, *more.Change(plain=1.0).draw(64, CPU)), as_it_is)
    changed = pictures.take(index, *more.Change(plain=0.5, recolour=0.5).draw(64, CPU))
    same = (changed == as_it_is).flatten(1).all(1).sum()
    assert 16 < same < 48


def test_damaged_captions_lose_words_or_get_unknown_ones() -> None:
    rng = random.Random(0)
    made = [damaged("smiling face with sunglasses", rng).split() for _ in range(200)]
    words = {"smiling", "face", "with", "sunglasses"}
    assert any(len(one) < 4 for one in made) and all(len(one) <= 4 for one in made)
    strange = {word for one in made for word in one} - words
    assert len(strange) > 50


def test_what_is_saved_is_a_pipeline_in_halves_and_in_parts(tmp_path: Path) -> None:
    one = Further(MODEL, tmp_path, tmp_path / "parts", Setting(device=CPU, batch={}))
    with torch.no_grad():
        one.unet.conv_out.bias += 1
    one.save()
    parts = sorted((tmp_path / "parts").iterdir())
    assert all(part.stat().st_size < 16e6 for part in parts)
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    saved, before = (MTUPipeline.from_pretrained(f) for f in (tmp_path / "unpacked" / "further", MODEL))
    torch.testing.assert_close(saved.unet.conv_out.bias, before.unet.conv_out.bias + 1, atol=1e-3, rtol=1e-3)
    assert torch.equal(saved.vae.decoder.conv_in.weight, before.vae.decoder.conv_in.weight)
    assert saved.tokenizer("thumbs up").input_ids == before.tokenizer("thumbs up").input_ids
