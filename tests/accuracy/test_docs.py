"""The tables of thresholds in docs/accuracy.md say what the files say."""

from __future__ import annotations

import re
from pathlib import Path

from mtu_compile.accuracy.threshold_file import read_thresholds
from mtu_compile.accuracy.thresholds import Thresholds

ROOT = Path(__file__).parents[2]
#: What stands in each column, in its order.
COLUMNS = (
    ("sqnr_db", "cosine"),
    ("guidance_ratio", "guidance_cosine"),
    ("pooled_guidance_ratio", "guidance_sqnr_db"),
    ("latent_psnr_db", "image_psnr_db"),
    ("ssim", "vif"),
    ("inside_psnr_db", "outside_psnr_db"),
    ("truth_drop_db",),
)


def test_the_table_of_thresholds_is_the_examples() -> None:
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    lines = page[page.index("| INT8 | any call") :].splitlines()[2:7]
    said = {}
    for line in lines:
        task, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        said[task] = {
            name: float(number)
            for names, cell in zip(COLUMNS, cells, strict=True)
            for name, number in zip(names, re.findall(r"\d+(?:\.\d+)?", cell), strict=cell != "-")
        }
    example = read_thresholds(ROOT / "examples" / "emoji" / "model" / "thresholds.json")["int8"]
    default = dict(Thresholds.default("int8").limits)
    assert said == {**example, "default, and FP8": default} and default == Thresholds.default("fp8").limits
