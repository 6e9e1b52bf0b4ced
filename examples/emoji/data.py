"""The emoji data set: Noto emoji (Apache-2.0) as 64-pixel pictures with captions, split by base name.

The pictures come from the npm package ``emoji-datasource-google``: one sheet of 66-pixel cells (64 pixels and a
1-pixel border) and ``emoji.json`` with names and skin-tone variants. Captions are the lower-cased names.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PACKAGE = "emoji-datasource-google@16.0.0"
SHEET = "package/img/google/sheets/64.png"
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


def fetch(cache: Path) -> Path:
    """Download the npm package into ``cache`` (once) and return the archive's path."""
    cache.mkdir(parents=True, exist_ok=True)
    found = sorted(cache.glob("emoji-datasource-google-*.tgz"))
    if not found:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=cache, check=True, stdout=subprocess.DEVNULL)
        found = sorted(cache.glob("emoji-datasource-google-*.tgz"))
    return found[-1]


def load(cache: Path) -> list[Emoji]:
    """Every emoji of the sheet, in the sheet's own order."""
    with tarfile.open(fetch(cache)) as archive:
        table_file, sheet_file = archive.extractfile(TABLE), archive.extractfile(SHEET)
        assert table_file is not None and sheet_file is not None
        table = json.load(table_file)
        rgba = Image.open(sheet_file).convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    sheet = np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))
    return list(_emoji(table, sheet))


def _emoji(table: list[dict], sheet: NDArray[np.uint8]) -> Iterator[Emoji]:  # type: ignore[type-arg]
    for row in table:
        if not row.get("has_img_google"):
            continue
        base = caption_of(row["name"] or row["short_name"])
        subcategory = row["subcategory"]
        in_domain = (
            row["category"] in DOMAIN_CATEGORIES
            or subcategory.startswith(DOMAIN_PREFIXES)
            or subcategory in DOMAIN_SUBCATEGORIES
        )
        variants: list[tuple[str | None, dict]] = [(None, row)]  # type: ignore[type-arg]
        # Two-person emoji have keys such as 1F3FB-1F3FF; only single tones make a one-instruction edit.
        variants += [(TONES[key], v) for key, v in row.get("skin_variations", {}).items() if key in TONES]
        for tone, cell in variants:
            if not cell.get("has_img_google"):
                continue
            x, y = cell["sheet_x"] * CELL + 1, cell["sheet_y"] * CELL + 1
            pixels = sheet[y : y + SIZE, x : x + SIZE].copy()
            yield Emoji(base, tone, in_domain, is_held_out(base), pixels, row["category"], aliases_of(row))


def caption_of(name: str) -> str:
    """``"WAVING HAND SIGN"`` → ``"waving hand"``: lower case, without the words that say nothing of the picture."""
    words = name.lower().replace("_", " ").replace("-", " ").replace(",", " ").split()
    return " ".join(w for w in words if w not in {"sign", "symbol", "emoji"}) or name.lower()


def aliases_of(row: dict) -> tuple[str, ...]:  # type: ignore[type-arg]
    """``["heart_eyes"]`` → ``("heart eyes",)``: the short names that are words."""
    names = (name.lower().replace("_", " ").replace("-", " ") for name in row["short_names"])
    return tuple(name for name in names if name.replace(" ", "").isalpha())
