"""The emoji recipe: what is trained on, how pictures are changed on the way, and the loop that ends by the clock."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from examples.emoji import data
from examples.emoji.captions import edits, forms
from examples.emoji.gpu import loop, pools
from examples.emoji.gpu.loop import Group, fit
from mtu_compile.model import encode

CPU = torch.device("cpu")


def picture(base: str, tone: str | None = None, aliases: tuple[str, ...] = ()) -> data.Emoji:
    seed = sum(f"{base}{tone}".encode())
    smooth = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    pixels = np.array(Image.fromarray(smooth).resize((64, 64), Image.Resampling.BICUBIC))
    return data.Emoji(base, tone, True, data.is_held_out(base), pixels, "People & Body", aliases)


EMOJI = [
    picture("thumbs up"),
    picture("thumbs up", "dark skin tone"),
    picture("man", "dark skin tone"),
    picture("man: red hair", "dark skin tone"),
    picture("man: bald", "light skin tone"),
]


def test_captions_people_type_come_after_the_plain_one() -> None:
    found = forms(picture("smiling face with sunglasses", aliases=("sunglasses",)), toned=False)
    assert found[0] == "smiling face with sunglasses"
    assert {"happy face with sunglasses", "a happy face with sunglasses", "sunglasses"} <= set(found)
    assert "thumbs up, yellow skin tone" in forms(EMOJI[0], toned=True)
    assert "dark skin tone, thumbs up" in forms(EMOJI[1], toned=True)


def test_edits_pair_tones_and_hair_of_the_same_emoji_only() -> None:
    pairs = {(e.source, e.target): e.prompts for e in edits(EMOJI)}
    assert set(pairs) == {(0, 1), (1, 0), (2, 3)}
    assert pairs[0, 1][0] == "make it dark skin tone"
    assert pairs[1, 0][0] == "make it yellow skin tone"
    assert pairs[2, 3][0] == "make the hair red"


def test_small_pictures_are_made_as_the_pipeline_makes_them() -> None:
    pictures = pools.Pictures(np.stack([e.pixels for e in EMOJI]), CPU)
    plain = pictures.variant(torch.arange(len(EMOJI)), pools.Variant())
    for row, e in zip(pools.small(plain), EMOJI, strict=True):
        wanted = encode.to_pixels(encode.degrade(Image.fromarray(e.pixels), 64, 64, 4), 64, 64)[0]
        # Pillow rounds and clips between its two passes: half a level of 255 on average, more where it overshoots.
        assert (row - wanted).abs().mean() < 0.5 / 127.5
        assert (row - wanted).abs().max() < 0.2


def test_variants_move_and_mirror_whole_pictures() -> None:
    pictures = pools.Pictures(np.stack([e.pixels for e in EMOJI]), CPU)
    index = torch.arange(len(EMOJI))
    plain = pictures.variant(index, pools.Variant())
    assert torch.equal(plain[0], torch.from_numpy(EMOJI[0].pixels).permute(2, 0, 1).float() / 127.5 - 1)
    assert torch.equal(pictures.variant(index, pools.Variant(flip=True)), plain.flip(-1))
    moved = pictures.variant(index, pools.Variant(down=3, right=-2))
    assert torch.equal(moved[:, :, 3:, :-2], plain[:, :, :-3, 2:])
    assert (moved[:, :, :3] == 1).all()  # white comes in
    assert torch.equal(pictures.variant(index, pools.Variant(order=5)), plain.flip(1))
    assert not any(v.order or v.upturn for v in pools.variants(20, least=8, strong=False, seed=0))


def test_indices_are_drawn_by_weight() -> None:
    torch.manual_seed(0)
    drawn = pools.Draw(torch.tensor([1.0, 0.0, 3.0]))(4000)
    share = torch.bincount(drawn, minlength=3) / len(drawn)
    assert share[1] == 0
    assert share[2] == pytest.approx(0.75, abs=0.04)


def noisy_regression(seen: list[float]) -> tuple[nn.Linear, list[Group], object]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    goal = torch.tensor([[1.0, -2.0, 0.5, 3.0]])

    def losses() -> torch.Tensor:
        x = torch.randn(32, 4)
        loss = (model(x) - x @ goal.T + 0.3 * torch.randn(32, 1)).pow(2).mean()
        seen.append(loss.item())
        return loss[None]

    return model, [Group((model,), 0.05, 0.0)], losses


def test_the_loop_learns_and_leaves_averaged_weights() -> None:
    model, groups, losses = noisy_regression([])
    history = fit(groups, losses, until=math.inf, most_steps=400, say=lambda text: None)
    assert history.steps == 400
    assert model.weight[0].tolist() == pytest.approx([1.0, -2.0, 0.5, 3.0], abs=0.1)


def test_the_loop_ends_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is an eighth of a second further whenever it is looked at."""
    looks = itertools.count()
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(looks) / 8))
    seen: list[float] = []
    _, groups, losses = noisy_regression(seen)
    history = fit(groups, losses, until=20.0, say=lambda text: None)
    assert history.steps == len(seen) > 0
    assert 20.0 <= history.seconds < 20.5


def test_a_loss_that_is_not_finite_does_not_reach_the_weights() -> None:
    model, groups, losses = noisy_regression([])
    calls = 0

    def broken() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return losses() * (math.nan if calls == 105 else 1.0)  # type: ignore[operator]

    said: list[str] = []
    fit(groups, broken, until=math.inf, most_steps=400, say=said.append)
    assert any("not finite" in text for text in said)
    assert torch.isfinite(model.weight).all()
