"""DDPM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.alphas import AlphaScheduler
from mtu_compile.runtime.schedulers.base import Array, denoised, drawn


class DDPM(AlphaScheduler):
    """Ancestral sampling of the training process: Ho et al. 2020, equations 6 and 7."""

    name = "ddpm"
    diffusers_class = "DDPMScheduler"
    declared: ClassVar = {
        **options.training(),
        **options.spacing("leading"),
        **options.NO_THRESHOLDING,
        "prediction_type": options.one_of("epsilon", "v_prediction", "sample"),
        "variance_type": options.one_of("fixed_small", "fixed_small_log", "fixed_large"),
        "clip_sample": options.flag(True),
        "clip_sample_range": options.number(1.0, 0, 1e6),
        "rescale_betas_zero_snr": options.flag(False),
    }
    draws_noise = True

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self._use(self._spaced(steps).round().astype(np.int64))
        self._refuse_pure_noise()

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        alpha_bar = float(self.alphas_cumprod[self.timesteps[index]])
        last = index == len(self.timesteps) - 1
        previous = 1.0 if last else float(self.alphas_cumprod[self.timesteps[index + 1]])
        alpha, beta_bar = alpha_bar / previous, 1 - alpha_bar
        beta = 1 - alpha
        original = denoised(self.prediction_type, output, sample, math.sqrt(alpha_bar), math.sqrt(beta_bar))
        mean = (math.sqrt(previous) * beta / beta_bar) * self._clip(original)
        mean = mean + (math.sqrt(alpha) * (1 - previous) / beta_bar) * sample
        if self.timesteps[index] == 0:
            return mean
        variance = beta
        if self.options["variance_type"] != "fixed_large":
            variance = max((1 - previous) / beta_bar * beta, 1e-20)  # diffusers' clamp, for its logarithm
        return mean + math.sqrt(variance) * drawn(noise)
