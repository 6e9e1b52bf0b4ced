"""Pictures and masks to what the UNet takes: the one place that inference and training share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mtu_compile.core.fit import Fit
from mtu_compile.core.tasks import Task
from mtu_compile.runtime import images
from mtu_compile.runtime.fitting import fit_mask, fit_picture


def to_pixels(picture: Image.Image, height: int, width: int, fit: Fit = "crop") -> Tensor:
    """A picture as [1, 3, height, width] in [-1, 1]: see ``fitting.Frame.picture``."""
    return torch.from_numpy(images.to_array(fit_picture(picture, (height, width), fit)))


def to_mask(
    mask: Image.Image, height: int, width: int, fit: Fit = "crop", *, over: tuple[int, int] | None = None
) -> Tensor:
    """A black and white mask as [1, 1, height, width], 1 where it is white: see ``fitting.fit_mask``."""
    return torch.from_numpy(fit_mask(mask, (height, width), fit, over=over))[None, None]


def degrade(picture: Image.Image, height: int, width: int, downscale: int, fit: Fit = "crop") -> Image.Image:
    """The small picture super-resolution starts from: fitted to the output size, then averaged down.

    ``height`` and ``width`` are the output's; the result is ``downscale`` times smaller.
    """
    return fit_picture(picture, (height, width), fit).reduce(downscale)


def latent_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask [B, 1, H, W] at latent size; each latent pixel takes the picture pixel at its centre."""
    return F.interpolate(mask, (height, width), mode="nearest-exact")


def encode_pixels(vae: Any, pixels: Tensor, batch: int = 16) -> Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] → scaled latents [B, C, h, w], float32: the mean of the posterior."""
    parts = [
        vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor
        for part in pixels.split(batch)
    ]
    return torch.cat(parts)


def condition_pieces(task: Task, vae: Any, pixels: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Condition channels [B, c, h, w] of one task, in the order of ``task.condition``; ``None`` without a condition.

    Args:
        pixels: source pictures [B, 3, H, W] in [-1, 1].
        mask: [B, 1, H, W], 1 where to repaint.
    """
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    pieces: Mapping[str, Any] = {
        "image": lambda: encode_pixels(vae, pixels),  # type: ignore[arg-type]
        # The masked area is 0, mid-grey, before encoding.
        "masked_image": lambda: encode_pixels(vae, pixels * (1 - mask)),  # type: ignore[operator]
        "mask": lambda: latent_mask(mask, mask.shape[2] // scale, mask.shape[3] // scale),  # type: ignore[arg-type,union-attr]
    }
    if not task.condition:
        return None
    return torch.cat([pieces[fill]().to(vae.device) for fill in task.condition], dim=1)
