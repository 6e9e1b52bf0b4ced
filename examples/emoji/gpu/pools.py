"""Pictures and their latents on the GPU: augmentation by indexing, and pools of encoded variants a step draws from.

A variant (flip, shift, size, colour order) is the same for every picture of a pool, so that the source and the target
of an edit stay aligned. Variant 0 is the picture as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.emoji import data

MARGIN = 8  # white pixels around a picture, for shifts
SCALES = (1.0, 0.85, 0.7, 0.55)
ORDERS = tuple(permutations(range(3)))  # of the colour channels; the first is the picture's own


@dataclass(frozen=True)
class Variant:
    """How a picture is changed: index into ``SCALES``, pixels down and right, mirrored, upside down, ``ORDERS``."""

    scale: int = 0
    down: int = 0
    right: int = 0
    flip: bool = False
    upturn: bool = False
    order: int = 0


class Pictures:
    """All pictures in all sizes on one canvas each, uint8."""

    def __init__(self, pixels: np.ndarray, device: torch.device) -> None:
        """``pixels`` [n, 64, 64, 3], uint8, on white."""
        self.count, self.device = len(pixels), device
        plain = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device)
        side = data.SIZE + 2 * MARGIN
        self.canvas = torch.full((len(SCALES), self.count, 3, side, side), 255, dtype=torch.uint8, device=device)
        for level, scale in enumerate(SCALES):
            size = round(data.SIZE * scale)
            place = (side - size) // 2
            for start in range(0, self.count, 512):
                part = plain[start : start + 512].float()
                if size != data.SIZE:
                    part = F.interpolate(part, (size, size), mode="bicubic", antialias=True).round().clamp(0, 255)
                target = self.canvas[level, start : start + 512, :, place : place + size, place : place + size]
                target.copy_(part.byte())
        self.orders = torch.tensor(ORDERS, device=device)
        self.line = torch.arange(data.SIZE, device=device)

    def take(
        self, index: Tensor, scale: Tensor, down: Tensor, right: Tensor, flip: Tensor, upturn: Tensor, order: Tensor
    ) -> Tensor:
        """Pictures [n, 3, 64, 64] in [-1, 1]; every argument [n]."""
        rows = torch.where(upturn[:, None], self.line.flip(0), self.line) + (MARGIN - down)[:, None]
        columns = torch.where(flip[:, None], self.line.flip(0), self.line) + (MARGIN - right)[:, None]
        channels = self.orders[order]
        picked = self.canvas[
            scale[:, None, None, None],
            index[:, None, None, None],
            channels[:, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]
        return picked.float() / 127.5 - 1

    def variant(self, index: Tensor, variant: Variant) -> Tensor:
        """Pictures ``index`` [n], all changed alike."""

        def full(value: int) -> Tensor:
            return torch.full_like(index, value)

        return self.take(
            index,
            full(variant.scale),
            full(variant.down),
            full(variant.right),
            full(int(variant.flip)).bool(),
            full(int(variant.upturn)).bool(),
            full(variant.order),
        )

    def random(self, index: Tensor) -> Tensor:
        """Pictures ``index`` [n], each changed at random in every way; a quarter is left as it is."""
        n, device = len(index), self.device
        # ``masked_fill``, not ``where``: a scalar there is copied from the CPU, which no CUDA graph can record.
        plain = torch.rand(n, device=device) < 0.25

        def draw(high: int, usual: float = 0.5, rest: int = 0) -> Tensor:
            value = torch.randint(high, (n,), device=device) + rest
            return value.masked_fill(plain | (torch.rand(n, device=device) < usual), 0)

        down, right = (draw(2 * MARGIN + 1, 0.2, -MARGIN) for _ in range(2))
        return self.take(index, draw(len(SCALES)), down, right, draw(2).bool(), draw(2, 0.8).bool(), draw(len(ORDERS)))


def small(pixels: Tensor, downscale: int = 4) -> Tensor:
    """[n, 3, H, W] in [-1, 1] made small by averaging and brought back bicubically, in 8 bits, as Pillow does."""
    bytes_ = F.avg_pool2d((pixels + 1) * 127.5, downscale).add(0.5).floor()
    grown = F.interpolate(bytes_, pixels.shape[-2:], mode="bicubic", antialias=True).round().clamp(0, 255)
    return grown / 127.5 - 1


def variants(count: int, *, least: int, strong: bool, seed: int) -> list[Variant]:
    """Variant 0 as it is, 1 mirrored, up to ``least`` shifted by a pixel or two, then anything.

    Args:
        strong: also smaller sizes, other colours and upside down, which only tasks without a prompt may see.
    """
    rng = np.random.default_rng(seed)
    made = [Variant(), Variant(flip=True)]
    while len(made) < least:
        down, right = (int(v) for v in rng.integers(-2, 3, 2))
        if down or right:
            made.append(Variant(down=down, right=right))
    while len(made) < count:
        reach = 7 if strong else 4
        made.append(
            Variant(
                scale=int(rng.choice(len(SCALES), p=(0.5, 0.25, 0.15, 0.1) if strong else (0.65, 0.35, 0, 0))),
                down=int(rng.integers(-reach, reach + 1)),
                right=int(rng.integers(-reach, reach + 1)),
                flip=bool(rng.integers(2)),
                upturn=strong and rng.random() < 0.15,
                order=int(rng.integers(len(ORDERS))) if strong and rng.random() < 0.5 else 0,
            )
        )
    return made[:count]


@torch.no_grad()  # type: ignore[untyped-decorator]
def encode_pool(
    pictures: Pictures,
    made: Sequence[Variant],
    encode: Callable[[Tensor], Tensor],
    change: Callable[[Tensor, int, Tensor], Tensor] = lambda pixels, variant, index: pixels,
    chunk: int = 1024,
) -> Tensor:
    """Latents [variants, n, C, h, w] of every picture in every variant.

    Args:
        encode: pictures [b, 3, 64, 64] in [-1, 1] → scaled latents.
        change: what is done to the pictures before (variant number and picture indices given).
    """
    rows = []
    everything = torch.arange(pictures.count, device=pictures.device)
    for number, variant in enumerate(made):
        parts = [encode(change(pictures.variant(i, variant), number, i)) for i in everything.split(chunk)]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


class Draw:
    """Draws indices with given weights, on the GPU and without asking the CPU, as a CUDA graph needs."""

    def __init__(self, weights: Tensor) -> None:
        self.edges = (weights.double().cumsum(0) / weights.double().sum()).float().contiguous()

    def __call__(self, count: int) -> Tensor:
        drawn = torch.rand(count, device=self.edges.device)
        return torch.searchsorted(self.edges, drawn).clamp_(max=len(self.edges) - 1)
