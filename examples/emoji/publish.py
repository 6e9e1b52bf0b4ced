"""Bring the trained pipeline into ``examples/emoji/model``, with its samples, held-out results and picture grid.

    python -m examples.emoji.publish --work build/emoji

The results compare the float pipeline with the truth on the held-out tenth: super-resolution against bicubic
upsampling, editing against the source picture left as it is, inpainting inside the mask against a plain fill. The grid
and the demo show rows of these by rank, the worst among them. With the committed folder as ``--model`` only these are
made anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from examples.emoji.results import STEPS, Made, Row, measure, ranked, request, rows_of, summary
from mtu_compile.accuracy.threshold_file import THRESHOLDS
from mtu_compile.model.pipeline import MTUPipeline

HERE = Path(__file__).resolve().parent
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


def grid(pipeline: MTUPipeline, held_out: Path, measured: dict[str, list[Made]]) -> Image.Image:
    """One band a task: pictures of prompts; then rows from the best to the worst: source, result and truth."""
    unknown = [row["prompt"] for row in spread(rows_of(held_out / "t2i"), 2, offset=11)]
    prompts = [*PROMPTS, *unknown]
    made = [pipeline(p, task="t2i", seed=i, num_inference_steps=STEPS).images[0] for i, p in enumerate(prompts)]
    bands = [("text-to-image: " + "; ".join(PROMPTS) + "; never seen: " + "; ".join(unknown), [made])]
    shown = {task: ranked(rows, len(prompts)) for task, rows in measured.items()}
    said = "; ".join(one.row["prompt"].removeprefix("make it ") for one in shown["edit"])
    labels = {
        "edit": f"editing, from the best of the rows to the worst: {said}",
        "sr": "super-resolution 16 to 64 pixels, from the best to the worst: input, result, truth",
        "inpaint": "inpainting, from the best to the worst: masked, result, truth",
    }
    for task, label in labels.items():
        rows = shown[task]
        sources = [given(one) for one in rows]
        bands.append((label, [sources, [one.result for one in rows], [one.truth for one in rows]]))
    return draw(bands, len(prompts))


def given(one: Made) -> Image.Image:
    """What a row started from, as it is shown: a hole is grey."""
    if one.mask is not None:
        return Image.composite(Image.new("RGB", one.truth.size, "grey"), one.truth, one.mask)
    return one.source.resize(one.truth.size, Image.Resampling.NEAREST)


def spread(rows: list[Row], count: int, offset: int = 1) -> list[Row]:
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


def demo_requests(measured: dict[str, list[Made]], folder: Path) -> None:
    """What ``make demo`` asks for: a prompt, of the other tasks the row in the middle by rank, and the worst hole."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    requests: list[dict[str, Any]] = [{"task": "t2i", "prompt": "red apple", "seed": 1, "output": "t2i.png"}]
    chosen = [(task, task, ranked(rows, 3)[1]) for task, rows in measured.items()]
    chosen.append(("inpaint", "inpaint-worst", ranked(measured["inpaint"], 2)[-1]))
    for task, name, one in chosen:
        one.source.save(folder / f"{name}.png", optimize=True)
        files = {"image": f"{name}.png"}
        if one.mask is not None:
            one.mask.save(folder / f"{name}-mask.png", optimize=True)
            files["mask"] = f"{name}-mask.png"
        requests.append(request(one, task, **files, output=f"{name}.png"))
    text = ",\n".join("  " + json.dumps(one) for one in requests)
    (folder / "requests.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", type=Path, default=None, help="the trained pipeline; WORK/mtu by default")
    parser.add_argument("--limit", type=int, default=40, help="held-out rows a task")
    args = parser.parse_args()
    trained = args.model or args.work / "mtu"

    pipeline = MTUPipeline.from_pretrained(trained)
    if trained.resolve() != HERE / "model":
        replace_model(HERE / "model", trained, args.work / "samples")
    measured = measure(pipeline, args.work / "held-out", args.limit)
    results = summary(measured)
    (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    demo_requests(measured, HERE / "demo")
    grid(pipeline, args.work / "held-out", measured).save(HERE / "grid.png", optimize=True)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
