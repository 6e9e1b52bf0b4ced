"""Pictures as the page carries them: PNG in data URIs, and differences one can see."""

from __future__ import annotations

import base64
from io import BytesIO

import numpy as np
from PIL import Image

#: Differences are multiplied by this, the same on every page, so that pages can be compared: what is 32 levels of 255
#: off, which nobody overlooks, is white.
AMPLIFIED = 8

#: Longest side the page carries, pixels. Larger pictures are scaled down, after differences are taken.
LONGEST = 384


def difference(reference: Image.Image, made: Image.Image) -> Image.Image:
    """Absolute difference of two pictures of equal size by channel, times ``AMPLIFIED``; black is equal."""
    want, have = (np.asarray(picture.convert("RGB"), dtype=np.int16) for picture in (reference, made))
    return Image.fromarray(np.minimum(np.abs(want - have) * AMPLIFIED, 255).astype(np.uint8))


def data_uri(picture: Image.Image) -> str:
    """``data:image/png;base64,…``, pixel for pixel up to ``LONGEST``."""
    if is_reduced(picture):
        picture = picture.copy()
        picture.thumbnail((LONGEST, LONGEST), Image.Resampling.BOX)
    written = BytesIO()
    picture.save(written, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")


def is_reduced(picture: Image.Image) -> bool:
    """Whether the page carries it smaller than it is."""
    return max(picture.size) > LONGEST
