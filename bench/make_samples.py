"""Pictures, masks and prompts to calibrate and check a model of random weights with: seeded, and of no meaning."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

PROMPTS = (
    "a red bicycle leaning against a brick wall",
    "two cats asleep on a windowsill in the afternoon",
    "a bowl of oranges, oil on canvas",
    "an old lighthouse in a storm, wide angle",
    "portrait of a woman with short grey hair, soft light",
    "a train crossing a stone bridge in autumn",
    "macro photograph of a beetle on a leaf",
    "a child's drawing of a house and a tree",
    "night market with paper lanterns, rain",
    "an astronaut riding a horse",
    "a loaf of bread on a wooden board",
    "mountains reflected in a lake at sunrise",
    "a robot reading a newspaper, 1950s advertisement",
    "a sailing boat in fog, black and white",
    "close-up of a hummingbird at a red flower",
    "an empty street in a small town, watercolour",
)

#: Rows of each task; the last quarter is for checks.
ROWS = 16


def write_samples(folder: Path, size: int, rows: int = ROWS) -> None:
    """Write ``folder/<task>/metadata.jsonl`` of the paper's four tasks, and the pictures they name.

    Args:
        folder: a pipeline's ``samples``; it is made.
        size: side of the pictures in pixels.
        rows: of each task.
    """
    for task in ("t2i", "edit", "sr", "inpaint"):
        place = folder / task
        place.mkdir(parents=True)
        lines = []
        for number in range(rows):
            row = {"split": "check" if number >= rows - rows // 4 else "calibration"}
            if task != "sr":
                row["prompt"] = PROMPTS[number % len(PROMPTS)]
            if task != "t2i":
                row["file_name"] = f"{number:02d}.png"
                _picture(number, size).save(place / row["file_name"])
            if task == "edit":
                row["image_file_name"] = f"{number:02d}-before.png"
                _picture(1000 + number, size).save(place / row["image_file_name"])
            lines.append(json.dumps(row) + "\n")
        (place / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _picture(seed: int, size: int) -> Image.Image:
    """Soft patches of colour with some grain: as much as a picture has of low and high frequencies."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), np.uint8).astype(np.uint8))
    soft = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC), np.float32)
    grain = rng.normal(0, 6, (size, size, 1))
    return Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8))
