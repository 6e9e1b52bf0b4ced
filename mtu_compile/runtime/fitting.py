"""Pictures of any size for an engine of one: cropped, padded or stretched, and their masks along with them.

This is the only place that does it: calibration, reference, training and the runtime all ask here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtu_compile.core.errors import ConfigError
from mtu_compile.core.fit import FITS, Fit
from mtu_compile.runtime.images import flatten

Array = NDArray[Any]

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Frame:
    """Which part of a source picture is used, and which part of the engine's picture that becomes.

    Attributes:
        source: (width, height) of the source in pixels.
        size: (height, width) of the engine's picture in pixels.
        box: left, top, right, bottom of the part that is used, in the source's pixels.
        place: left, top, right, bottom of what it becomes, in the engine's pixels.
    """

    source: tuple[int, int]
    size: tuple[int, int]
    box: Box
    place: tuple[int, int, int, int]

    @classmethod
    def of(cls, source: tuple[int, int], size: tuple[int, int], fit: Fit = "crop") -> Frame:
        """The frame of a ``source`` (width, height) in a picture of ``size`` (height, width).

        Raises:
            ConfigError: an unknown ``fit``.
        """
        if fit not in FITS:
            raise ConfigError(f"pictures are not fitted by {fit!r}", hint=f"take one of {', '.join(FITS)}")
        (width, height), (rows, columns) = source, size
        box: Box = (0, 0, width, height)
        place = (0, 0, columns, rows)
        wider, taller = width * rows > height * columns, width * rows < height * columns
        # Whole pixels at the left and the top: what is not scaled stays as sharp as it was.
        if fit == "crop" and wider:
            kept = height * columns / rows
            left = int((width - kept) / 2)
            box = (left, 0, left + kept, height)
        elif fit == "crop" and taller:
            kept = width * rows / columns
            top = int((height - kept) / 2)
            box = (0, top, width, top + kept)
        elif fit == "pad" and wider:
            inner = max(1, round(height * columns / width))
            top = (rows - inner) // 2
            place = (0, top, columns, top + inner)
        elif fit == "pad" and taller:
            inner = max(1, round(width * rows / height))
            left = (columns - inner) // 2
            place = (left, 0, left + inner, rows)
        return cls(source, size, box, place)

    def picture(self, picture: Image.Image) -> Image.Image:
        """The source as RGB of the engine's size: flattened on white, bicubic."""
        flat = self._scale(flatten(picture), self.box, Image.Resampling.BICUBIC)
        return flat if self._filled else Image.fromarray(np.pad(np.asarray(flat), (*self._around, (0, 0)), mode="edge"))

    def mask(self, mask: Image.Image) -> Array:
        """A mask of the source as [H, W] float32: 1 where it is brighter than half. Nothing of the padding is.

        The mask is laid over the source: one of another size is that of the same picture, scaled, and one of other
        proportions is distorted to the source's.
        """
        (width, height), (across, down) = mask.size, self.source
        left, top, right, bottom = self.box
        box = (left * width / across, top * height / down, right * width / across, bottom * height / down)
        grey = self._scale(mask.convert("L"), self.box if mask.size == self.source else box, Image.Resampling.NEAREST)
        selected = (np.asarray(grey) >= 128).astype(np.float32)
        return selected if self._filled else np.pad(selected, self._around)

    def _scale(self, picture: Image.Image, box: Box, method: Image.Resampling) -> Image.Image:
        left, top, right, bottom = self.place
        inner = (right - left, bottom - top)
        if picture.size == inner and box == (0, 0, *inner):
            return picture
        return picture.resize(inner, method, box=box)

    @property
    def _filled(self) -> bool:
        return self.place == (0, 0, self.size[1], self.size[0])

    @property
    def _around(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows above and below, columns left and right."""
        left, top, right, bottom = self.place
        return (top, self.size[0] - bottom), (left, self.size[1] - right)


def fit_picture(picture: Image.Image, size: tuple[int, int], fit: Fit = "crop") -> Image.Image:
    """An RGB picture of ``size`` (height, width): see ``Frame.picture``."""
    return Frame.of(picture.size, size, fit).picture(picture)


def fit_mask(
    mask: Image.Image, size: tuple[int, int], fit: Fit = "crop", *, over: tuple[int, int] | None = None
) -> Array:
    """[H, W] of zeros and ones for ``size`` (height, width), see ``Frame.mask``.

    Args:
        mask: what ``masks.read_mask`` gives.
        over: (width, height) of the picture it belongs to; its own if not given.
    """
    return Frame.of(over or mask.size, size, fit).mask(mask)
