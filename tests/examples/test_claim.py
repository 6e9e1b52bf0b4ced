"""The comparison of multi- and single-task networks: what is measured on held-out rows, and the tables made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor

from examples.emoji import claim, claim_page, data, routers
from examples.emoji.gpu import held_out, pools
from examples.emoji.gpu.diffusion import Velocity
from mtu_compile.accuracy.metrics import psnr_db
from mtu_compile.core.tasks import Task
from mtu_compile.model.pipeline import MTUPipeline

TASKS = {one.name: one for one in (Task.from_json(row) for row in json.loads(claim.TASKS.read_text()))}
CPU = torch.device("cpu")


def picture(base: str, tone: str | None = None) -> data.Emoji:
    pixels = np.random.default_rng(sum(f"{base}{tone}".encode())).integers(0, 256, (64, 64, 3), np.uint8)
    return data.Emoji(base, tone, True, True, pixels, "People & Body")


EMOJI = [picture("thumbs up"), picture("thumbs up", "dark skin tone"), picture("pizza")]


def encode(pixels: Tensor) -> Tensor:
    """Four channels of 16×16, of which the pictures can be told apart."""
    return torch.cat((F.avg_pool2d(pixels, 4), pixels[:, :1, ::4, ::4]), dim=1)


class Tokens:
    """Each prompt's length in place of words."""

    def __call__(self, texts: Sequence[str], **how: object) -> object:
        return type("Tokens", (), {"input_ids": torch.tensor([[len(text)] * 2 for text in texts])})


def read(ids: Tensor) -> Tensor:
    return ids[..., None].float()


def rows_of(task: str, **more: int) -> held_out.Rows:
    return held_out.rows_of(TASKS[task], EMOJI, Tokens(), encode, read, CPU, **more)  # type: ignore[arg-type]


def pixels_of(*which: int) -> Tensor:
    return torch.from_numpy(np.stack([EMOJI[i].pixels for i in which])).permute(0, 3, 1, 2)


def test_rows_are_the_pictures_edits_and_holes_of_a_task() -> None:
    edits = rows_of("edit")
    assert edits.prompts == ("make it dark skin tone", "make it yellow skin tone")
    assert torch.equal(edits.truth, pixels_of(1, 0))
    torch.testing.assert_close(edits.condition[:, :4], encode(pixels_of(0, 1).float() / 127.5 - 1))
    small = rows_of("sr")
    assert torch.equal(small.truth, pixels_of(0, 1, 2)) and set(small.prompts) == {""}
    torch.testing.assert_close(small.condition[:, :4], encode(pools.small(pixels_of(0, 1, 2).float() / 127.5 - 1)))
    holes = rows_of("inpaint")
    assert len(holes) == len(EMOJI) * held_out.MASKS and holes.hole is not None
    masked = (holes.truth.float() / 127.5 - 1) * ~holes.hole
    torch.testing.assert_close(holes.condition[:, 1:], encode(masked))
    assert set(holes.condition[:, :1].unique().tolist()) == {0.0, 1.0}
    assert rows_of("t2i").condition.shape == (3, 5, 16, 16) and not rows_of("t2i").condition.any()
    fewer = rows_of("inpaint", most=4)
    assert len(fewer) == len(fewer.prompts) == len(fewer.hole) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("task", list(TASKS))
def test_networks_that_know_the_truth_arrive_there(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell has a truth of its own, which only its guided prediction leads to; calls are cut into several."""
    monkeypatch.setattr(held_out, "MOST", 4)
    rows, cells, kinds = rows_of(task), [7, 3], held_out.ROWS[TASKS[task].guided]
    truth = torch.stack([rows.clean, rows.clean.flip(-1)])
    velocity, calls, place = Velocity(CPU), 0, 0

    def predict(sample: Tensor, t: Tensor, states: Tensor, asked: Sequence[int]) -> Tensor:
        nonlocal calls, place
        assert list(asked) == cells and len(sample) == len(states) == len(t)
        given, prompts = (x.unflatten(0, (2, len(kinds), -1)) for x in (sample, states))
        part = slice(place, place + given.shape[2])
        for number, kind in enumerate(kinds):
            for cell in range(2):
                assert torch.equal(given[cell, number, :, 4:], rows.condition[part] * float(kind.condition))
                assert torch.equal(prompts[cell, number], rows.states[part] * float(kind.prompt))
        calls += 1
        if calls % held_out.STEPS == 0:
            place += given.shape[2]
        signal, spread = velocity.signal[t[0]], velocity.noise[t[0]]
        wanted = truth[:, None, part]
        return (signal * (given[:, :, :, :4] - signal * wanted) / spread - spread * wanted).flatten(0, 2)

    made = held_out.sample(predict, TASKS[task], rows, cells)
    assert calls > held_out.STEPS and place == len(rows)
    # The schedule ends at timestep 0, where a little of the noise is left.
    wanted = velocity.signal[0] * truth + velocity.noise[0] * held_out.noise_of(rows, 1)
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3)


def test_the_prediction_error_is_each_cells_own() -> None:
    rows, velocity = rows_of("sr"), Velocity(CPU)

    def predict(sample: Tensor, t: Tensor, states: Tensor, cells: Sequence[int]) -> Tensor:
        clean = rows.clean.repeat(2, 1, 1, 1)
        signal, spread = velocity.signal[t], velocity.noise[t]
        noise = (sample[:, :4] - signal * clean) / spread
        off = torch.tensor([0.0, 0.5]).repeat_interleave(len(rows))[:, None, None, None]
        return signal * noise - spread * clean + off

    exact, off = held_out.prediction_error(predict, rows, [0, 1])
    assert exact == pytest.approx(0.0, abs=1e-6)
    assert off == pytest.approx(0.25, rel=1e-3)


def test_figures_are_what_they_are_called() -> None:
    truth, made = pixels_of(0, 1), pixels_of(1, 2)
    hole = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    hole[:, :, 10:30, 5:25] = True
    for found, where in ((held_out.psnr(truth, made), slice(None)), (held_out.psnr(truth, made, hole), None)):
        for i in range(2):
            pair = [x[i].permute(1, 2, 0).numpy() for x in (truth, made)]
            if where is None:
                pair = [x[10:30, 5:25] for x in pair]
            assert float(found[i]) == pytest.approx(psnr_db(*pair, peak=255.0))
    points = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    assert held_out.frechet(points, points + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5.0, abs=1e-3)
    assert held_out.frechet(points, 2 * points) == pytest.approx(float(points.T.cov().trace()), rel=0.02)


def test_every_task_of_every_seed_has_every_variant() -> None:
    found = claim.networks(len(TASKS), 2)
    cells = {(one.variant, one.seed, task) for one in found for task in one.tasks}
    variants = {one.variant for one in found}
    assert len(cells) == len(variants) * 2 * len(TASKS) == sum(len(one.tasks) for one in found)
    assert all(one.experts == len(one.tasks) == 1 for one in found if one.variant == claim.SINGLE)


def test_the_page_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "paper.md"
    shutil.copy(claim_page.PAGE, page)
    monkeypatch.setattr("sys.argv", ["claim_page", "--page", str(page)])
    claim_page.main()
    assert page.read_text() == claim_page.PAGE.read_text(), "run python -m examples.emoji.claim_page"


def test_a_gain_counts_when_it_exceeds_the_seeds_spread() -> None:
    def record(multi: Sequence[float], single: Sequence[float]) -> dict[str, object]:
        rows = []
        for variant, values in ((claim.MULTI, multi), (claim.SINGLE, single)):
            for seed, value in enumerate(values):
                tasks = {one.task: {one.key: value if one.higher else -value} for one in claim_page.MAIN}
                rows.append({"variant": variant, "seed": seed, "tasks": tasks})
        return {"networks": rows}

    assert "on **4 of 4** tasks" in claim_page.verdict(record((2.0, 2.1, 2.0), (1.0, 1.0, 1.1)))
    assert "on **4 of 4** tasks" in claim_page.verdict(record((1.0, 1.3, 1.0), (1.1, 1.1, 1.2)))
    assert "on **0 of 4** tasks" in claim_page.verdict(record((1.0, 1.0, 1.1), (2.0, 2.1, 2.0)))


def test_what_is_folded_is_what_the_pretrained_network_lacks(
    mtu_pipeline_dir: Path, base_pipeline_dir: Path, tmp_path: Path
) -> None:
    unet = MTUPipeline.from_pretrained(mtu_pipeline_dir).unet
    plain = UNet2DConditionModel.from_pretrained(base_pipeline_dir / "unet")
    weights = routers.expert_weights(unet)
    assert next(routers.short(name) for name in weights).startswith("down")
    assert all(np.allclose(one, 0.25) for one in weights.values())
    together = next(line for line in routers.folded(unet).splitlines() if "together" in line).split("|")
    left = sum(p.numel() for p in unet.parameters()) - int(together[2].replace(",", ""))
    norms = sum(p.numel() for name, p in plain.named_parameters() if ".norm3." in name)
    convolutions = [sum(p.numel() for p in conv.parameters()) for conv in unet.task_conv_in.convs]
    wanted = sum(p.numel() for p in plain.parameters()) - norms
    wanted += sum(convolutions) / len(convolutions) - sum(p.numel() for p in plain.conv_in.parameters())
    assert left == pytest.approx(wanted, abs=1)
    routers.draw(weights, [task.name for task in unet.tasks], tmp_path / "routers.png")
    assert Image.open(tmp_path / "routers.png").width > 200
