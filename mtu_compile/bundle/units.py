"""Units of what is measured: the last word of a number's name says what values it can have, and how people write it.

``worst_sqnr_db`` is in decibels, ``guidance_cosine`` is a cosine. So each number of a check has a type in the manifest
without a list of their names, and a new metric brings its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtu_compile.bundle.kinds import Cosine, Decibels, Likeness, Magnitude, Ratio, Share


@dataclass(frozen=True)
class Unit:
    """A unit of measurement.

    Attributes:
        kind: the numbers it allows, as a type (``mtu_compile.bundle.kinds``).
        symbol: behind a number; empty where there is none.
    """

    kind: Any
    symbol: str = ""


#: By the last word of a name, words being parted by ``_`` and ``.``.
UNITS: Mapping[str, Unit] = {
    "db": Unit(Decibels, "dB"),
    "cosine": Unit(Cosine),
    "ratio": Unit(Ratio),
    "ssim": Unit(Likeness),
    "vif": Unit(Likeness),
    "difference": Unit(Magnitude),
    "share": Unit(Share),
}


def last_word(name: str) -> str:
    """``"guidance_cosine"`` → ``"cosine"``."""
    return name.replace(".", "_").rpartition("_")[2]


def unit_of(name: str) -> Unit | None:
    """The unit of the number called ``name``; ``None`` for a name that does not say."""
    return UNITS.get(last_word(name))
