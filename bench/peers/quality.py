"""How near quantised pictures of the example are to the same library's float ones, from the same noise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from PIL import Image

from bench.peers.contenders import Contender, file_name
from bench.peers.race import Process, Refused

STEPS, PICTURES = 20, 16


def prompts() -> list[str]:
    """Prompts of the example's held-out rows, drawn by chance, always the same ones."""
    from bench.held_out import DATA
    from calibration.samples import load_samples
    from mtu_compile.core.tasks import PAPER_TASKS

    rows = load_samples(DATA, next(task for task in PAPER_TASKS if task.name == "t2i"))
    return [row.prompt for row in random.Random(0).sample(list(rows), PICTURES)]


def against_float(able: Sequence[Contender], root: Path, size: int, log: Path) -> dict[str, dict[str, Any]]:
    """Mean PSNR in dB and mean SSIM of each quantised contender's pictures to its float one's."""
    wanted = {name for one in able if one.float_name for name in (one.name, one.float_name)}
    found: dict[str, dict[str, Any]] = {}
    pictures: dict[str, list[Image.Image]] = {}
    asked = prompts()
    for one in able:
        if one.name not in wanted:
            continue
        try:
            pictures[one.name] = _pictures(one, asked, root, size, log)
        except Refused as error:
            found[one.name] = {"quality_error": str(error)}
    for one in able:
        if one.name in pictures and one.float_name in pictures:
            found[one.name] = _compare(pictures[one.name], pictures[one.float_name])
    return found


def _pictures(one: Contender, asked: Sequence[str], root: Path, size: int, log: Path) -> list[Image.Image]:
    out = root / "pictures" / file_name(one.name)
    out.mkdir(parents=True, exist_ok=True)
    with Process(one, root, size, log) as process:
        process.tell("load")
        for index, prompt in enumerate(asked):
            process.tell("image", steps=STEPS, prompt=prompt, seed=index, out=str(out / f"{index}.png"))
    return [Image.open(out / f"{index}.png").convert("RGB") for index in range(len(asked))]


def _compare(quantised: Sequence[Image.Image], floats: Sequence[Image.Image]) -> dict[str, Any]:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(quantised, floats, strict=True)]
    # Equal pictures have no finite PSNR: what a byte can tell apart is the most that is counted.
    psnr = [min(peak_signal_noise_ratio(b, a), 60.0) if (a != b).any() else 60.0 for a, b in pairs]
    return {"psnr_db": mean(psnr), "ssim": mean(structural_similarity(b, a, channel_axis=2) for a, b in pairs)}
