"""The emoji data set: Noto emoji (Apache-2.0) as 64-pixel pictures with captions, split by base name.

The pictures come from the npm package ``emoji-datasource-google``: one sheet of 66-pixel cells (64 pixels and a
1-pixel border) and ``emoji.json`` with names and skin-tone variants. Captions are the lower-cased names.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"
SHEET = "package/img/{vendor}/sheets/64.png"
TABLE = "package/emoji.json"
CELL = 66
SIZE = 64

TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}

#: What the pictures without a tone are called where a tone is meant.
YELLOW = "yellow skin tone"

#: The editing instructions, one per tone.
EDIT_PROMPTS = tuple(f"make it {tone}" for tone in (YELLOW, *TONES.values()))

#: The narrower domain the diffusion model learns: what a 9M-parameter UNet can learn well on two cores.
DOMAIN_CATEGORIES = ("Smileys & Emotion", "Food & Drink")
DOMAIN_PREFIXES = ("animal-", "plant-", "hand", "body-parts")
DOMAIN_SUBCATEGORIES = ("person",)


@dataclass(frozen=True)
class Emoji:
    """One picture. ``base`` is the name all skin-tone variants share; ``tone`` is ``None`` for the yellow one."""

    base: str
    tone: str | None
    in_domain: bool
    held_out: bool
    pixels: NDArray[np.uint8]  # [64, 64, 3], on white
    category: str = ""
    aliases: tuple[str, ...] = ()  # short names people type, as words

    @property
    def caption(self) -> str:
        return self.base if self.tone is None else f"{self.base}, {self.tone}"

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.caption)


def is_held_out(base: str) -> bool:
    """A fixed tenth, by the SHA-256 of the base name, so that all variants of an emoji fall on the same side."""
    return hashlib.sha256(base.encode()).digest()[0] * 10 < 256


def fetch(cache: Path, package: str = PACKAGE) -> Path:
    """Download an npm package into ``cache`` (once) and return the archive's path."""
    archive = cache / f"{package.replace('@', '-')}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=cache, check=True, stdout=subprocess.DEVNULL)
    return archive


def read(archive: Path, vendor: str) -> tuple[list[dict[str, Any]], NDArray[np.uint8]]:
    """The table and the sheet [H, W, 3], on white, of an ``emoji-datasource`` package."""
    with tarfile.open(archive) as files:
        table_file, sheet_file = files.extractfile(TABLE), files.extractfile(SHEET.format(vendor=vendor))
        assert table_file is not None and sheet_file is not None
        table = json.load(table_file)
        rgba = Image.open(sheet_file).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return table, np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def load(cache: Path) -> list[Emoji]:
    """Every emoji of the sheet, in the sheet's own order."""
    table, sheet = read(fetch(cache), "google")
    return list(_emoji(table, sheet))


def pictures(
    table: Sequence[dict[str, Any]], sheet: NDArray[np.uint8], vendor: str, cell: int = CELL
) -> Iterator[tuple[dict[str, Any], dict[str, Any], str | None, NDArray[np.uint8]]]:
    """Every emoji's row, its own cell (the row, or the variant's), tone and pixels that ``vendor`` drew itself.

    Two-person emoji have keys such as 1F3FB-1F3FF; only single tones make a one-instruction edit.
    """
    border = (cell - SIZE) // 2
    for row in table:
        toned = [(TONES[key], v) for key, v in (row.get("skin_variations") or {}).items() if key in TONES]
        for tone, own in ((None, row), *toned):
            if row.get(f"has_img_{vendor}") and own.get(f"has_img_{vendor}"):
                x, y = own["sheet_x"] * cell + border, own["sheet_y"] * cell + border
                yield row, own, tone, sheet[y : y + SIZE, x : x + SIZE].copy()


def _emoji(table: list[dict[str, Any]], sheet: NDArray[np.uint8]) -> Iterator[Emoji]:
    for row, _, tone, pixels in pictures(table, sheet, "google"):
        base = caption_of(row["name"] or row["short_name"])
        subcategory = row["subcategory"]
        in_domain = (
            row["category"] in DOMAIN_CATEGORIES
            or subcategory.startswith(DOMAIN_PREFIXES)
            or subcategory in DOMAIN_SUBCATEGORIES
        )
        yield Emoji(base, tone, in_domain, is_held_out(base), pixels, row["category"], aliases_of(row))


def caption_of(name: str) -> str:
    """``"WAVING HAND SIGN"`` → ``"waving hand"``: lower case, without the words that say nothing of the picture."""
    words = name.lower().replace("_", " ").replace("-", " ").replace(",", " ").split()
    return " ".join(w for w in words if w not in {"sign", "symbol", "emoji"}) or name.lower()


def aliases_of(row: dict[str, Any]) -> tuple[str, ...]:
    """``["heart_eyes"]`` → ``("heart eyes",)``: the short names that are words."""
    names = (name.lower().replace("_", " ").replace("-", " ") for name in row["short_names"])
    return tuple(name for name in names if name.replace(" ", "").isalpha())
