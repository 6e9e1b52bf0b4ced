"""Further emoji sets: the same emoji as others, or the same in other years, drew them.

Older Noto (Apache-2.0) and Twemoji (CC-BY 4.0), npm packages of the family ``data`` reads; for tasks that see a picture
and so its style. A picture is on that side of the split which today's name of its code point is on: an emoji that is
held out is held out in every set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from examples.emoji import data

#: Mean squared error, in levels of 255, below which a picture is one that another set has, too.
SAME = 30.0
#: … and below which it is too near a held-out picture of another name, as some flags are.
NEAR_HELD_OUT = 600.0


@dataclass(frozen=True)
class EmojiSet:
    """An npm package of the ``emoji-datasource`` family, and the side in pixels of a cell of its sheet."""

    vendor: str
    version: str
    cell: int = data.CELL

    @property
    def package(self) -> str:
        return f"emoji-datasource-{self.vendor}@{self.version}"


SETS = (
    EmojiSet("google", "7.0.2"),
    EmojiSet("google", "4.1.0"),
    EmojiSet("google", "3.0.0", cell=data.SIZE),
    EmojiSet("twitter", "16.0.0"),
)


def load(cache: Path, today: Sequence[data.Emoji], sets: Sequence[EmojiSet] = SETS) -> list[list[data.Emoji]]:
    """The training pictures of every set, each under the name it has ``today``.

    Args:
        today: all of ``data.load(cache)``, held out or not.
    """
    table, _ = data.read(data.fetch(cache), "google")
    names = names_of(table)
    known: dict[tuple[str, str | None], list[data.Emoji]] = {(e.base, e.tone): [e] for e in today}
    held_out = points([e.pixels for e in today if e.held_out])
    return [_training(one, cache, names, known, held_out) for one in sets]


def names_of(table: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Base names by code points."""
    return {
        code: data.caption_of(row["name"] or row["short_name"])
        for row in table
        for cell in (row, *row.get("skin_variations", {}).values())
        for code in codes_of(cell)
    }


def codes_of(cell: Mapping[str, Any]) -> list[str]:
    return [code for code in (cell["unified"], cell.get("non_qualified")) if code]


def _training(
    one: EmojiSet,
    cache: Path,
    names: Mapping[str, str],
    known: dict[tuple[str, str | None], list[data.Emoji]],
    held_out: NDArray[np.float32],
) -> list[data.Emoji]:
    """A set's pictures that may be trained on; they join the ``known``."""
    table, sheet = data.read(data.fetch(cache, one.package), one.vendor)
    found = []
    for _, own, tone, pixels in data.pictures(table, sheet, one.vendor, one.cell):
        base = next((names[code] for code in codes_of(own) if code in names), None)
        if base is None or data.is_held_out(base) or (base, tone) not in known:
            continue
        alike = known[base, tone]
        if errors(points([pixels]), points([e.pixels for e in alike])).min() >= SAME:
            found.append(replace(alike[0], pixels=pixels))
            alike.append(found[-1])
    nearest = errors(points([e.pixels for e in found]), held_out).min(axis=1)
    return [e for e, error in zip(found, nearest, strict=True) if error >= NEAR_HELD_OUT]


def points(pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Pictures as vectors [n, d], every other pixel of every other line: as good for comparing."""
    return np.stack([pixels[::2, ::2].ravel() for pixels in pictures]).astype(np.float32)


def errors(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean squared error [n, m] of vectors [n, d] to [m, d]."""
    squares = np.square(one).sum(axis=1)[:, None] + np.square(other).sum(axis=1)
    means: NDArray[np.float32] = (squares - 2 * one @ other.T) / one.shape[1]
    return means
