"""Bring the trained pipeline into ``examples/emoji/model``, with its samples, held-out results and picture grid.

    python -m examples.emoji.publish --work build/emoji

The results compare the float pipeline with the truth on the held-out tenth: super-resolution against bicubic
upsampling, editing against the source picture left as it is, inpainting inside the mask against a plain fill.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path
from statistics import fmean

import numpy as np
from PIL import Image, ImageDraw
from skimage.restoration import inpaint_biharmonic

from examples.emoji.make_tasks import seeded_mask
from mtu_compile.accuracy.formulas import picture_psnr_db, psnr_db, ssim
from mtu_compile.accuracy.threshold_file import THRESHOLDS
from mtu_compile.model.pipeline import MTUPipeline

HERE = Path(__file__).resolve().parent
STEPS = 20
PAD, LABEL = 4, 12

#: What the grid asks for in words: six that people type for what the model has learnt, and then two held-out names.
PROMPTS = (
    "a red apple",
    "a happy face with sunglasses",
    "thumbs up, dark skin tone",
    "pig face",
    "slice of pizza",
    "tulip",
)


def rows_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def small(truth: Image.Image) -> Image.Image:
    return truth.resize((truth.width // 4, truth.height // 4), Image.Resampling.BOX)


def likeness(truth: Image.Image, picture: Image.Image) -> tuple[float, float | None]:
    """PSNR, decibels, and SSIM."""
    pair = np.asarray(truth), np.asarray(picture)
    return picture_psnr_db(*pair), ssim(*pair)


def evaluate(pipeline: MTUPipeline, held_out: Path, limit: int) -> dict[str, dict[str, float]]:
    """Mean PSNR and SSIM against the truth on held-out rows, beside what doing nothing would give."""
    results = {}
    for task, baseline in (("sr", "bicubic"), ("edit", "unchanged source")):
        rows = random.Random(0).sample(rows_of(held_out / task), limit)
        ours, theirs = [], []
        for seed, row in enumerate(rows):
            truth = Image.open(held_out / task / row["file_name"]).convert("RGB")
            source = small(truth) if task == "sr" else Image.open(held_out / task / row["image_file_name"])
            made = pipeline(row.get("prompt", ""), task=task, image=source, seed=seed, num_inference_steps=STEPS)
            plain = source.convert("RGB").resize(truth.size, Image.Resampling.BICUBIC)
            ours.append(likeness(truth, made.images[0]))
            theirs.append(likeness(truth, plain))
        results[task] = {
            "pictures": limit,
            "psnr_db": fmean(p for p, _ in ours),
            "ssim": fmean(s for _, s in ours),
            f"{baseline} psnr_db": fmean(p for p, _ in theirs),
            f"{baseline} ssim": fmean(s for _, s in theirs),
        }
    inside, filled = [], []
    rng = random.Random(0)
    for seed, row in enumerate(rng.sample(rows_of(held_out / "inpaint"), limit)):
        truth = Image.open(held_out / "inpaint" / row["file_name"]).convert("RGB")
        mask = seeded_mask(rng)
        made = pipeline(
            row["prompt"], task="inpaint", image=truth, mask_image=mask, seed=seed, num_inference_steps=STEPS
        )
        where = np.asarray(mask) > 0
        plain = (255 * inpaint_biharmonic(np.asarray(truth), where, channel_axis=-1)).clip(0, 255)
        inside.append(psnr_db(np.asarray(truth)[where], np.asarray(made.images[0])[where], peak=255.0))
        filled.append(psnr_db(np.asarray(truth)[where], plain[where], peak=255.0))
    results["inpaint"] = {
        "pictures": limit,
        "psnr_db inside the mask": fmean(inside),
        "biharmonic fill psnr_db": fmean(filled),
    }
    return results


def grid(pipeline: MTUPipeline, held_out: Path) -> Image.Image:
    """One band per task: text-to-image; then source and result above each other."""
    unknown = [row["prompt"] for row in spread(rows_of(held_out / "t2i"), 2, offset=11)]
    prompts = [*PROMPTS, *unknown]
    columns = len(prompts)
    bands: list[tuple[str, list[list[Image.Image]]]] = []
    made = [pipeline(p, task="t2i", seed=i, num_inference_steps=STEPS).images[0] for i, p in enumerate(prompts)]
    bands.append(("text-to-image: " + "; ".join(PROMPTS) + "; never seen: " + "; ".join(unknown), [made]))

    rows = spread(rows_of(held_out / "edit"), columns)
    sources = [Image.open(held_out / "edit" / row["image_file_name"]).convert("RGB") for row in rows]
    made = [
        pipeline(row["prompt"], task="edit", image=source, seed=i, num_inference_steps=STEPS).images[0]
        for i, (row, source) in enumerate(zip(rows, sources, strict=True))
    ]
    bands.append(("editing: " + "; ".join(row["prompt"].removeprefix("make it ") for row in rows), [sources, made]))

    truths = [Image.open(held_out / "sr" / r["file_name"]).convert("RGB") for r in spread(rows_of(held_out / "sr"), 8)]
    low = [small(t).resize(t.size, Image.Resampling.NEAREST) for t in truths]
    made = [
        pipeline(task="sr", image=small(t), seed=i, num_inference_steps=STEPS).images[0] for i, t in enumerate(truths)
    ]
    bands.append(("super-resolution 16 to 64 pixels: input, result, truth", [low, made, truths]))

    rows = spread(rows_of(held_out / "inpaint"), columns, offset=3)
    truths = [Image.open(held_out / "inpaint" / row["file_name"]).convert("RGB") for row in rows]
    masks = [seeded_mask(random.Random(i)) for i in range(columns)]
    holes = [Image.composite(Image.new("RGB", t.size, "grey"), t, m) for t, m in zip(truths, masks, strict=True)]
    made = [
        pipeline(row["prompt"], task="inpaint", image=truth, mask_image=mask, seed=i, num_inference_steps=STEPS).images[
            0
        ]
        for i, (row, truth, mask) in enumerate(zip(rows, truths, masks, strict=True))
    ]
    bands.append(("inpainting: masked, result, truth", [holes, made, truths]))
    return draw(bands, columns)


def spread(rows: list[dict[str, str]], count: int, offset: int = 1) -> list[dict[str, str]]:
    return [rows[offset + i * (len(rows) - offset) // count] for i in range(count)]


def draw(bands: list[tuple[str, list[list[Image.Image]]]], columns: int, scale: int = 2) -> Image.Image:
    side = 64 * scale
    width = columns * (side + PAD) + PAD
    height = sum(LABEL + PAD + len(lines) * (side + PAD) for _, lines in bands) + PAD
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), PAD
    for label, lines in bands:
        pen.text((PAD, y), label, fill="black")
        y += LABEL + PAD
        for line in lines:
            for column, picture in enumerate(line):
                enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(enlarged, (PAD + column * (side + PAD), y))
            y += side + PAD
    return sheet


def replace_model(model: Path, trained: Path, samples: Path) -> None:
    """Put a trained pipeline and its samples in the place of ``model``, which keeps its thresholds.

    A model that was trained anew has to be as good in INT8 as the one before, or has to be given others
    (``mtu-compile check --suggest-thresholds``).
    """
    thresholds = model / THRESHOLDS
    asked = thresholds.read_bytes() if thresholds.is_file() else None
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(trained, model)
    shutil.copytree(samples, model / "samples")
    if asked is not None and not thresholds.exists():
        thresholds.write_bytes(asked)


def demo_pictures(held_out: Path, folder: Path) -> None:
    """The held-out inputs ``make demo`` starts from."""
    folder.mkdir(exist_ok=True)
    Image.open(held_out / "edit" / "i-love-you-hand.png").save(folder / "edit.png")
    small(Image.open(held_out / "sr" / "tropical-fish.png")).save(folder / "small.png")
    Image.open(held_out / "inpaint" / "grimacing-face.png").save(folder / "inpaint.png")
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle((6, 40, 58, 63), fill=255)
    mask.save(folder / "mask.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", type=Path, default=None, help="the trained pipeline; WORK/mtu by default")
    parser.add_argument("--limit", type=int, default=40, help="held-out rows a task")
    args = parser.parse_args()
    trained = args.model or args.work / "mtu"

    pipeline = MTUPipeline.from_pretrained(trained)
    replace_model(HERE / "model", trained, args.work / "samples")
    demo_pictures(args.work / "held-out", HERE / "demo")
    results = evaluate(pipeline, args.work / "held-out", args.limit)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    grid(pipeline, args.work / "held-out").save(HERE / "grid.png", optimize=True)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
