"""Random inpainting masks: rectangles, ellipses and free-form strokes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

#: Share of the picture a random mask covers.
LEAST_COVERED, MOST_COVERED = 0.1, 0.6


def random_mask(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A mask [height, width], 255 where to repaint, else 0, covering 10–60 % of the picture."""
    while True:
        canvas = Image.new("L", (width, height))
        (_rectangle, _ellipse, _strokes)[rng.integers(3)](ImageDraw.Draw(canvas), rng, height, width)
        mask = np.asarray(canvas)
        if LEAST_COVERED <= float(np.mean(mask > 0)) <= MOST_COVERED:
            return mask


def _box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    h, w = (max(1, round(size * rng.uniform(0.3, 0.9))) for size in (height, width))
    y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    return x, y, x + w - 1, y + h - 1


def _rectangle(draw: ImageDraw.ImageDraw, rng: np.random.Generator, height: int, width: int) -> None:
    draw.rectangle(_box(rng, height, width), fill=255)


def _ellipse(draw: ImageDraw.ImageDraw, rng: np.random.Generator, height: int, width: int) -> None:
    draw.ellipse(_box(rng, height, width), fill=255)


def _strokes(draw: ImageDraw.ImageDraw, rng: np.random.Generator, height: int, width: int) -> None:
    """A brush that wanders: the free-form masks of Yu et al., "Free-Form Image Inpainting with Gated Convolution"."""
    size = min(height, width)
    for _ in range(int(rng.integers(1, 4))):
        point = rng.uniform((0, 0), (width, height))
        angle = rng.uniform(0, 2 * np.pi)
        brush = max(2, round(size * rng.uniform(0.1, 0.25)))
        for _ in range(int(rng.integers(2, 7))):
            angle += rng.uniform(-1.2, 1.2)
            step = size * rng.uniform(0.15, 0.4)
            end = np.clip(point + step * np.array([np.cos(angle), np.sin(angle)]), 0, (width - 1, height - 1))
            draw.line([*point, *end], fill=255, width=brush)
            x, y, r = *end, brush / 2
            draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
            point = end
