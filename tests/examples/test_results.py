"""Which held-out rows the grid and the demo show."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from examples.emoji import publish
from examples.emoji.results import Made, ranked

WHITE = Image.new("RGB", (64, 64), "white")


def made(name: str, psnr_db: float, mask: Image.Image | None = None) -> Made:
    return Made({"file_name": f"{name}.png", "prompt": name}, 5, WHITE, mask, WHITE, WHITE, psnr_db, 0.0)


ROWS = [
    made("owl", 20),
    made("hand--dark-skin-tone", 30),
    made("hand--medium-dark-skin-tone", 99),  # the same emoji: its first row counts
    made("taco", 10),
    made("dove", 25),
    made("jar", 15),
]


def names(rows: list[Made]) -> list[str]:
    return [one.base for one in rows]


def test_rows_are_shown_from_the_best_to_the_worst_one_an_emoji() -> None:
    assert names(ranked(ROWS, 5)) == ["hand", "dove", "owl", "jar", "taco"]
    assert names(ranked(ROWS, 3)) == ["hand", "owl", "taco"]
    assert names(ranked(ROWS, 2)) == ["hand", "taco"]
    assert names(ranked(ROWS[:2], 8)) == ["hand", "owl"]  # there are no more


def test_the_demo_asks_for_the_middle_of_each_task_and_for_the_worst_hole(tmp_path: Path) -> None:
    masked = [made(one.base, one.psnr_db, Image.new("L", (64, 64), 255)) for one in ROWS]
    publish.demo_requests({"edit": ROWS, "inpaint": masked}, tmp_path / "demo")
    asked = json.loads((tmp_path / "demo" / "requests.json").read_text())
    assert [(one["task"], one["prompt"], one["output"]) for one in asked] == [
        ("t2i", "red apple", "t2i.png"),
        ("edit", "owl", "edit.png"),
        ("inpaint", "owl", "inpaint.png"),
        ("inpaint", "taco", "inpaint-worst.png"),
    ]
    for one in asked[1:]:
        assert (tmp_path / "demo" / one["image"]).is_file() and one["seed"] == 5
        assert ("mask" in one) == (one["task"] == "inpaint")
