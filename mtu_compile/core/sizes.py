"""The sizes that SDXL's UNets are told of a picture (Podell et al., 2023, section 2.2), under diffusers' names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import ConfigError
from mtu_compile.core.families import TIME_IDS, Family
from mtu_compile.core.schema import Mismatch, Range, conform

#: Height and width in pixels, and a distance from top and left. SDXL's training pictures go to 4,000 or so.
Size = tuple[Annotated[int, Range(1, 32768)], Annotated[int, Range(1, 32768)]]
Offset = tuple[Annotated[int, Range(0, 32768)], Annotated[int, Range(0, 32768)]]


@dataclass(frozen=True)
class Sizes:
    """What a training picture of the wanted kind would have come from.

    Attributes:
        original_size: (height, width) before it was scaled for training; small ones look enlarged. That of the result
            by default, as in diffusers.
        crops_coords_top_left: (top, left) of the part that was trained on; others than 0 look cut off.
        target_size: (height, width) it was trained at; that of the result by default.
    """

    original_size: Size | None = None
    crops_coords_top_left: Offset | None = None
    target_size: Size | None = None

    @property
    def given(self) -> tuple[str, ...]:
        """Names of those that were said."""
        return tuple(name for name, value in vars(self).items() if value is not None)

    def check(self) -> None:
        """``ConfigError`` naming a value that is no size."""
        for name, kind in (("original_size", Size), ("crops_coords_top_left", Offset), ("target_size", Size)):
            try:
                if getattr(self, name) is not None:
                    conform(kind, getattr(self, name), name)
            except Mismatch as mismatch:
                raise mismatch.at("the request", error=ConfigError, hint="give two whole numbers of pixels") from None

    def require_taken(self, family: Family) -> None:
        """``ConfigError`` if a size was said and UNets of ``family`` are told none."""
        if self.given and TIME_IDS not in family.conditions:
            raise ConfigError(
                f"a UNet of {family.label} is told no {self.given[0]}", hint=f"leave {self.given[0]} away: it is SDXL's"
            )

    def time_ids(self, size: tuple[int, int]) -> NDArray[np.float32]:
        """The UNet's ``time_ids`` [6] for a result of ``size`` (height, width)."""
        original, target = self.original_size or size, self.target_size or size
        return np.array([*original, *(self.crops_coords_top_left or (0, 0)), *target], np.float32)
