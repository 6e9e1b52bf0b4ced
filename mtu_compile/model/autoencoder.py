"""Autoencoders whose latents are shifted or normalised by channel, made plain."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


@torch.no_grad()  # type: ignore[untyped-decorator]
def fold_statistics(vae: AutoencoderKL) -> AutoencoderKL:
    """Fold ``shift_factor``, ``latents_mean`` and ``latents_std`` into the autoencoder's 1×1 convolutions.

    Pipelines of diffusers turn an encoded latent ``z`` into the UNet's by ``(z - shift) * scale`` or
    ``(z - mean) * scale / std``, and back before decoding. Both are affine for each channel, and so are the
    convolutions between encoder and latent, and latent and decoder. Afterwards ``z * scale`` is all that is left to
    do, in training, in the runtime and in the tools that open a bundle; the config says so.

    Args:
        vae: is changed in place; without statistics it stays as it is.
    """
    config, channels = vae.config, int(vae.config.latent_channels)
    mean, std = torch.zeros(channels), torch.ones(channels)
    if config.latents_mean is not None:
        mean, std = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
    elif config.shift_factor:
        mean = torch.full((channels,), float(config.shift_factor))
    if not mean.any() and bool((std == 1).all()):
        return vae
    # The encoder gives the means of the latent, then the logarithms of their variances.
    scale, shift = torch.cat([1 / std, torch.ones(channels)]), torch.cat([-mean / std, -2 * std.log()])
    if vae.device.type != "meta":  # an outline has no numbers
        vae.quant_conv = _scaled_after(vae.quant_conv or _identity(2 * channels, vae), scale, shift)
        vae.post_quant_conv = _scaled_before(vae.post_quant_conv or _identity(channels, vae), std, mean)
    vae.register_to_config(
        shift_factor=None, latents_mean=None, latents_std=None, use_quant_conv=True, use_post_quant_conv=True
    )
    return vae


def _identity(channels: int, vae: AutoencoderKL) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 1, device=vae.device, dtype=vae.dtype)
    conv.weight.copy_(torch.eye(channels)[..., None, None])
    conv.bias.zero_()
    return conv


def _scaled_after(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> nn.Conv2d:
    """A 1×1 convolution whose output ``y`` becomes ``y * scale + shift``, by channel."""
    weight, bias = conv.weight.float().cpu(), conv.bias.float().cpu()
    bias = bias * scale + shift
    conv.weight.copy_(weight * scale[:, None, None, None])
    conv.bias.copy_(bias)
    return conv


def _scaled_before(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> nn.Conv2d:
    """A 1×1 convolution that reads ``x * scale + shift`` instead of its input ``x``, by channel."""
    weight, bias = conv.weight.float().cpu(), conv.bias.float().cpu()
    bias = bias + weight[:, :, 0, 0] @ shift  # before the weight, which may be the same memory, is written
    conv.weight.copy_(weight * scale[None, :, None, None])
    conv.bias.copy_(bias)
    return conv
