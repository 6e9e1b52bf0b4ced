"""Prompts as people type them, not as Unicode has them: what a bundle makes of each, and whether it is what was meant.

    python -m examples.emoji.typed BUNDLE             of a bundle for this CPU the table of README.md and typed.png
    python -m examples.emoji.typed BUNDLE --write     the pictures in typed/ anew first (the emoji set, by npm)

A prompt counts as understood if no emoji of the whole set is nearer to the result than the one that was meant.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bench.held_out import into_docs, markdown
from examples.emoji import data
from mtu_compile import runtime
from mtu_compile.accuracy.formulas import picture_psnr_db

HERE = Path(__file__).parent
FOLDER, SHEET, PAGE = HERE / "typed", HERE / "typed.png", HERE / "README.md"
ROWS = "metadata.jsonl"
SEED = 1
#: Of the sheet: pictures side by side; pixels of a picture and of the place for its prompt; letters above a picture.
COLUMNS, SIDE, LABEL, LETTERS = 8, 128, 26, 20

#: A picture by base name and tone.
Name = tuple[str, str | None]
DARK, MEDIUM, LIGHT = "dark skin tone", "medium skin tone", "light skin tone"

#: Prompts of text-to-image, and what they mean.
WORDS: Mapping[str, Name] = {
    "red apple": ("red apple", None),
    "a happy face with sunglasses": ("smiling face with sunglasses", None),
    "thumbs up with dark skin": ("thumbs up", DARK),
    "a slice of pizza": ("slice of pizza", None),
    "cup of coffee": ("hot beverage", None),
    "a sad face": ("crying face", None),
    "ladybug": ("lady beetle", None),
    "a woman with red hair": ("woman: red hair", None),
}

#: Instructions, what they are about, and what they mean; only the last was trained on with this very picture.
EDITS: Sequence[tuple[str, Name, Name]] = (
    ("make it dark skin tone", ("i love you hand", None), ("i love you hand", DARK)),
    ("medium skin", ("open hands", LIGHT), ("open hands", MEDIUM)),
    ("give it light skin tone", ("bearded person", DARK), ("bearded person", LIGHT)),
    ("make the skin dark", ("palm up hand", MEDIUM), ("palm up hand", DARK)),
    ("make the hair red", ("woman: bald", None), ("woman: red hair", None)),
    ("blond hair", ("woman: bald", MEDIUM), ("woman: blond hair", MEDIUM)),
    ("change the hair to white", ("person: curly hair", LIGHT), ("person: white hair", LIGHT)),
    ("make the hair curly", ("man", DARK), ("man: curly hair", DARK)),
)


@dataclass(frozen=True)
class Typed:
    """A prompt, and the pictures it is about.

    Attributes:
        task: ``t2i`` or ``edit``.
        wanted: what is meant, [64, 64, 3].
        source: what is to be changed.
    """

    task: str
    prompt: str
    wanted: Image.Image
    source: Image.Image | None = None


#: Makes a picture of task, prompt and source.
Maker = Callable[[str, str, Image.Image | None], Image.Image]


def read(folder: Path = FOLDER) -> list[Typed]:
    """Every prompt, with its pictures."""
    rows = [json.loads(line) for line in (folder / ROWS).read_text(encoding="utf-8").splitlines()]

    def picture(name: str | None) -> Image.Image | None:
        return None if name is None else Image.open(folder / name).convert("RGB")

    found = []
    for row in rows:
        wanted = picture(row["file_name"])
        assert wanted is not None
        found.append(Typed(row["task"], row["prompt"], wanted, picture(row.get("image_file_name"))))
    return found


def write(emoji: Sequence[data.Emoji], folder: Path = FOLDER) -> None:
    """Write prompts and pictures of this file's lists, in the layout of data folders."""
    known = {(e.base, e.tone): e for e in emoji}
    folder.mkdir(exist_ok=True)

    def keep(name: Name) -> str:
        one = known[name]
        Image.fromarray(one.pixels).save(folder / f"{one.slug}.png", optimize=True)
        return f"{one.slug}.png"

    rows = [{"task": "t2i", "prompt": prompt, "file_name": keep(name)} for prompt, name in WORDS.items()]
    rows += [
        {"task": "edit", "prompt": prompt, "file_name": keep(wanted), "image_file_name": keep(source)}
        for prompt, source, wanted in EDITS
    ]
    (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def nearest(picture: Image.Image, others: NDArray[np.uint8]) -> int:
    """Which of ``others`` [n, H, W, 3] has the least squared error to ``picture``."""
    difference = others.astype(np.float32) - np.asarray(picture.convert("RGB"), np.float32)
    return int(np.square(difference).mean(axis=(1, 2, 3)).argmin())


def sheet(asked: Sequence[Typed], made: Sequence[Image.Image]) -> Image.Image:
    """Every result under its prompt, behind its source if it has one."""
    page = Image.new("RGB", (COLUMNS * SIDE, len(asked) * (SIDE + LABEL)), "white")
    pen, x, y = ImageDraw.Draw(page), 0, 0
    for one, result in zip(asked, made, strict=True):
        shown = [result] if one.source is None else [one.source, result]
        if x + len(shown) * SIDE > page.width:
            x, y = 0, y + SIDE + LABEL
        pen.text((x + 4, y + 1), textwrap.fill(one.prompt, len(shown) * LETTERS), fill="black", spacing=1)
        for picture in shown:
            page.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y + LABEL))
            x += SIDE
    return page.crop((0, 0, page.width, y + SIDE + LABEL))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"), help="where the emoji set lies")
    parser.add_argument("--write", action="store_true", help="the pictures of typed/ anew")
    args = parser.parse_args()
    emoji = data.load(args.cache)
    if args.write:
        write(emoji)
    asked, every = read(), np.stack([e.pixels for e in emoji])
    with runtime.load(args.bundle) as loaded:
        made = [loaded.run(one.task, one.prompt, image=one.source, seed=SEED).image for one in asked]
    sheet(asked, made).save(SHEET, optimize=True)
    rows, understood = [], 0
    for one, result in zip(asked, made, strict=True):
        found = emoji[nearest(result, every)]
        right = np.array_equal(found.pixels, np.asarray(one.wanted))
        understood += right
        psnr = f"{picture_psnr_db(np.asarray(one.wanted), np.asarray(result)):.1f}"
        rows.append([one.task, one.prompt, "what was meant" if right else found.caption, psnr])
    table = markdown(["task", "prompt", f"nearest of {len(emoji):,} emoji", "PSNR to what was meant, dB"], rows)
    into_docs(PAGE, "typed", f"{understood} of {len(asked)} prompts are understood.\n\n{table}")


if __name__ == "__main__":
    main()
