"""What is predicted, and what is switched on only while it is learnt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from examples.emoji.train_base import SCHEDULER

#: Dropout in the residual blocks while training: there are only some 1,700 different designs.
DROPOUT_RATE = 0.1


class Velocity:
    """Noisy latents and velocity targets at timesteps spread evenly over the schedule."""

    def __init__(self, device: torch.device) -> None:
        alphas = SCHEDULER.alphas_cumprod.to(device)
        self.signal, self.noise = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]
        self.total = len(alphas)

    def __call__(self, clean: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps and targets of ``clean`` [b, C, h, w], whose parts have ``sizes``."""
        steps = [
            (torch.arange(n, device=clean.device) + torch.rand(n, device=clean.device)) / n * self.total for n in sizes
        ]
        t = torch.cat(steps).long().clamp(max=self.total - 1)
        noise = torch.randn_like(clean)
        signal, spread = self.signal[t], self.noise[t]
        return signal * clean + spread * noise, t, signal * noise - spread * clean


def set_dropout(unet: nn.Module, rate: float) -> None:
    """Only while training: the configuration that is saved knows no dropout."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.dropout.p = rate
