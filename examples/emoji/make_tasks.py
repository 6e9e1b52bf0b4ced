"""Write the four tasks as image folders that ``mtu-compile train`` and ``mtu-compile build --data`` read.

    python -m examples.emoji.make_tasks --work build/emoji

``train/`` holds what is trained on, ``held-out/`` the fixed tenth that is not, and ``samples/`` the few rows the model
folder carries for calibration (from the training part) and for the accuracy check (from the held-out part).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from examples.emoji import data
from mtu_compile.core.masks import random_mask

CALIBRATION_ROWS = 16
CHECK_ROWS = 8

Row = dict[str, Any]
#: Saves a picture in the task's folder and returns its name there.
Keep = Callable[[data.Emoji], str]


def text_to_image(emoji: Sequence[data.Emoji], keep: Keep) -> list[Row]:
    return [{"file_name": keep(e), "prompt": e.caption} for e in emoji]


def edit(emoji: Sequence[data.Emoji], keep: Keep) -> list[Row]:
    """Every ordered pair of skin tones of one emoji, with the instruction that leads from one to the other."""
    rows = []
    for base in dict.fromkeys(e.base for e in emoji if e.tone):
        variants = [e for e in emoji if e.base == base]
        for source, target in permutations(variants, 2):
            prompt = f"make it {target.tone or data.YELLOW}"
            rows.append({"file_name": keep(target), "image_file_name": keep(source), "prompt": prompt})
    return rows


def super_resolution(emoji: Sequence[data.Emoji], keep: Keep) -> list[Row]:
    """Only the targets: the small pictures are made from them by downscaling."""
    return [{"file_name": keep(e)} for e in emoji]


TASKS = {"t2i": text_to_image, "edit": edit, "sr": super_resolution, "inpaint": text_to_image}


def write(
    folder: Path, emoji: Sequence[data.Emoji], build: Callable[[Sequence[data.Emoji], Keep], list[Row]]
) -> list[Row]:
    """Write one task's pictures and ``metadata.jsonl``; return its rows."""
    folder.mkdir(parents=True)

    def keep(e: data.Emoji) -> str:
        name = f"{e.slug}.png"
        if not (folder / name).exists():
            Image.fromarray(e.pixels).save(folder / name, optimize=True)
        return name

    rows = build(emoji, keep)
    write_rows(folder, rows)
    return rows


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def seeded_mask(rng: random.Random) -> Image.Image:
    """An ellipse or a rectangle over a third of the picture, white where it is to be repainted."""
    mask = Image.new("L", (data.SIZE, data.SIZE))
    w, h = rng.randint(26, 44), rng.randint(26, 44)
    x, y = rng.randint(4, data.SIZE - w - 4), rng.randint(4, data.SIZE - h - 4)
    draw = ImageDraw.Draw(mask)
    (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + w, y + h), fill=255)
    return mask


def random_masks(count: int, device: torch.device) -> Tensor:
    """[count, 1, 64, 64], 1 where to repaint: half as ``mtu-compile train`` draws them, half as in the checks."""
    draws, shapes = np.random.default_rng(0), random.Random(0)
    made = [
        np.asarray(seeded_mask(shapes)) if i % 2 else random_mask(draws, data.SIZE, data.SIZE) for i in range(count)
    ]
    return torch.from_numpy(np.stack(made)[:, None] > 0).float().to(device)


def write_samples(folder: Path, parts: dict[str, Path], task: str) -> None:
    """Pick the rows the model carries: calibration from the training part, check from the held-out part."""
    folder.mkdir(parents=True)
    rng = random.Random(f"samples-{task}")
    chosen: list[Row] = []
    for split, count in (("calibration", CALIBRATION_ROWS), ("check", CHECK_ROWS)):
        source = parts[split] / task
        rows = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
        for row in rng.sample(rows, count):
            for key in ("file_name", "image_file_name"):
                if key in row:
                    shutil.copy(source / row[key], folder / row[key])
            if task == "inpaint":
                row["mask_file_name"] = f"mask-{len(chosen):02}.png"
                seeded_mask(rng).save(folder / row["mask_file_name"], optimize=True)
            chosen.append({**row, "split": split})
    write_rows(folder, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"))
    args = parser.parse_args()

    emoji = [e for e in data.load(args.cache) if e.in_domain]
    parts = {"calibration": args.work / "train", "check": args.work / "held-out"}
    samples = args.work / "samples"
    for folder in (*parts.values(), samples):
        shutil.rmtree(folder, ignore_errors=True)
    for name, build in TASKS.items():
        for split, folder in parts.items():
            rows = write(folder / name, [e for e in emoji if e.held_out == (split == "check")], build)
            print(f"{folder / name}: {len(rows)} rows")
        write_samples(samples / name, parts, name)


if __name__ == "__main__":
    main()
