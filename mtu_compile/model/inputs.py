"""What a task is given, and the samples that its UNet makes of it in one step."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from mtu_compile.core.errors import ConfigError
from mtu_compile.core.fit import Fit
from mtu_compile.core.guidance import ROWS
from mtu_compile.core.notices import Notice
from mtu_compile.core.tasks import Task
from mtu_compile.model import encode
from mtu_compile.runtime.masks import MaskMode, check_selection, read_mask


def read_source(
    task: Task,
    image: Image.Image | None,
    mask: Image.Image | None,
    size: tuple[int, int],
    fit: Fit,
    mask_mode: MaskMode,
    *,
    scale: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None, tuple[Notice, ...]]:
    """What a task is given, read and fitted: picture [1, 3, H, W] in [-1, 1], mask [1, 1, H, W], 1 where to repaint.

    Args:
        size: height and width of the output, pixels.
        scale: picture pixels per latent pixel.
        device: where the results go.

    Returns:
        ``None`` for what the task does not take, and what of the mask may not be as it was meant.

    Raises:
        ConfigError: the task's picture or mask is missing.
    """
    height, width = size
    needs_image = {"image", "masked_image"} & set(task.condition)
    needs_mask = {"mask", "masked_image"} & set(task.condition)
    if needs_image and image is None:
        raise ConfigError(f"task {task.name!r} needs a source picture", hint="pass image")
    if needs_mask and mask is None:
        raise ConfigError(f"task {task.name!r} needs a mask", hint="pass mask_image, white where to repaint")
    pixels = grey = None
    notices: tuple[Notice, ...] = ()
    if needs_image:
        assert image is not None
        pixels = encode.to_pixels(image, height, width, fit).to(device)
    if needs_mask:
        assert mask is not None
        selected, notices = read_mask(mask, mask_mode)
        over = None if image is None else image.size
        grey = encode.to_mask(selected, height, width, fit, over=over)
        at_latent = encode.latent_mask(grey, height // scale, width // scale)
        notices += check_selection(grey[0, 0].numpy(), at_latent[0, 0].numpy())
        grey = grey.to(device)
    return pixels, grey, notices


def unet_batch(task: Task, noisy: Tensor, condition: Tensor | None) -> Tensor:
    """The noisy latent [1, 4, h, w] with its condition, once for each part of the guidance: [b, 4+c, h, w]."""
    batch = noisy.expand(task.unet_batch, -1, -1, -1)
    if condition is None:
        return batch.contiguous()
    given, none = condition.to(noisy), torch.zeros_like(condition).to(noisy)
    conditions = torch.cat([given if row.condition else none for row in ROWS[task.guidance]])
    return torch.cat([batch, conditions], dim=1)
