"""What the float pipeline makes of held-out rows, beside the truth and beside what doing nothing would give."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from skimage.restoration import inpaint_biharmonic

from examples.emoji import data
from examples.emoji.make_tasks import seeded_mask
from mtu_compile.accuracy.formulas import picture_psnr_db, psnr_db, ssim
from mtu_compile.model.pipeline import MTUPipeline

STEPS = 20

Row = dict[str, str]


@dataclass(frozen=True)
class Made:
    """A held-out row and what was made of it.

    Attributes:
        row: of ``metadata.jsonl``.
        seed: of the noise.
        source: what the task was given: the picture to be changed, the small one, or the whole one.
        mask: of the hole, if the task has one.
        result, truth: [64, 64] pictures.
        psnr_db: of the result against the truth; inside the mask where there is one.
        plain_psnr_db: the same of what doing nothing gives.
        ssim, plain_ssim: of the whole pictures; ``None`` for inpainting.
    """

    row: Row
    seed: int
    source: Image.Image
    mask: Image.Image | None
    result: Image.Image
    truth: Image.Image
    psnr_db: float
    plain_psnr_db: float
    ssim: float | None = None
    plain_ssim: float | None = None

    @property
    def base(self) -> str:
        """The emoji, whatever its tone."""
        stem = Path(self.row["file_name"]).stem
        tones = [f"--{tone.replace(' ', '-')}" for tone in data.TONES.values()]
        return next((stem.removesuffix(tone) for tone in sorted(tones, key=len)[::-1] if stem.endswith(tone)), stem)


def rows_of(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def small(truth: Image.Image) -> Image.Image:
    return truth.resize((truth.width // 4, truth.height // 4), Image.Resampling.BOX)


def measure(pipeline: MTUPipeline, held_out: Path, limit: int) -> dict[str, list[Made]]:
    """By task, ``limit`` rows drawn by chance: super-resolution, editing and inpainting."""
    return {
        "sr": _whole(pipeline, held_out / "sr", "sr", limit),
        "edit": _whole(pipeline, held_out / "edit", "edit", limit),
        "inpaint": _holes(pipeline, held_out / "inpaint", limit),
    }


def _whole(pipeline: MTUPipeline, folder: Path, task: str, limit: int) -> list[Made]:
    found = []
    for seed, row in enumerate(random.Random(0).sample(rows_of(folder), limit)):
        truth = Image.open(folder / row["file_name"]).convert("RGB")
        source = small(truth) if task == "sr" else Image.open(folder / row["image_file_name"]).convert("RGB")
        made = pipeline(row.get("prompt", ""), task=task, image=source, seed=seed, num_inference_steps=STEPS)
        plain = source.resize(truth.size, Image.Resampling.BICUBIC)
        pair, other = (
            (picture_psnr_db(np.asarray(truth), np.asarray(one)), ssim(np.asarray(truth), np.asarray(one)))
            for one in (made.images[0], plain)
        )
        found.append(Made(row, seed, source, None, made.images[0], truth, pair[0], other[0], pair[1], other[1]))
    return found


def _holes(pipeline: MTUPipeline, folder: Path, limit: int) -> list[Made]:
    found, rng = [], random.Random(0)
    for seed, row in enumerate(rng.sample(rows_of(folder), limit)):
        truth = Image.open(folder / row["file_name"]).convert("RGB")
        mask = seeded_mask(rng)
        made = pipeline(
            row["prompt"], task="inpaint", image=truth, mask_image=mask, seed=seed, num_inference_steps=STEPS
        )
        where, pixels = np.asarray(mask) > 0, np.asarray(truth)
        plain = (255 * inpaint_biharmonic(pixels, where, channel_axis=-1)).clip(0, 255)
        inside = [
            psnr_db(pixels[where], np.asarray(one)[where], peak=255.0) for one in (made.images[0], plain.astype(float))
        ]
        found.append(Made(row, seed, truth, mask, made.images[0], truth, inside[0], inside[1]))
    return found


def summary(measured: dict[str, list[Made]]) -> dict[str, dict[str, float]]:
    """Means, as ``results.json`` has them."""
    results: dict[str, dict[str, float]] = {}
    for task, baseline in (("sr", "bicubic"), ("edit", "unchanged source")):
        rows = measured[task]
        results[task] = {
            "pictures": len(rows),
            "psnr_db": fmean(one.psnr_db for one in rows),
            "ssim": fmean(one.ssim or 0.0 for one in rows),
            f"{baseline} psnr_db": fmean(one.plain_psnr_db for one in rows),
            f"{baseline} ssim": fmean(one.plain_ssim or 0.0 for one in rows),
        }
    rows = measured["inpaint"]
    results["inpaint"] = {
        "pictures": len(rows),
        "psnr_db inside the mask": fmean(one.psnr_db for one in rows),
        "biharmonic fill psnr_db": fmean(one.plain_psnr_db for one in rows),
    }
    return results


def ranked(rows: Sequence[Made], count: int) -> list[Made]:
    """``count`` of the rows from the best to the worst, evenly by rank; of each emoji the first row counts alone."""
    first: dict[str, Made] = {}
    for one in rows:
        first.setdefault(one.base, one)
    order = sorted(first.values(), key=lambda one: -one.psnr_db)
    last = len(order) - 1
    places = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
    return [order[place] for place in places]


def request(one: Made, task: str, **files: str) -> dict[str, Any]:
    """A row as ``mtu-compile run --batch`` asks for it."""
    prompt = {"prompt": one.row["prompt"]} if "prompt" in one.row else {}
    return {"task": task, **prompt, "seed": one.seed, **files}
