"""Latent consistency models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.core.errors import ConfigError
from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.alphas import AlphaScheduler
from mtu_compile.runtime.schedulers.base import Array, denoised, drawn

#: Standard deviation of the data that the boundary condition is written for (Luo et al. 2023, section 3).
SIGMA_DATA = 0.5


class LCM(AlphaScheduler):
    """Multistep consistency sampling: Luo et al. 2023 (arXiv:2310.04378), algorithm 3."""

    name = "lcm"
    diffusers_class = "LCMScheduler"
    declared: ClassVar = {
        **options.training(0.00085, 0.012, "scaled_linear"),
        **options.NO_THRESHOLDING,
        "prediction_type": options.one_of("epsilon", "v_prediction", "sample"),
        "original_inference_steps": options.count(50, 1, options.MOST_TRAIN_STEPS),
        "clip_sample": options.flag(False),
        "clip_sample_range": options.number(1.0, 0, 1e6),
        "timestep_scaling": options.number(10.0, 0, 1e6),
        "rescale_betas_zero_snr": options.flag(False),
        # diffusers reads none of these: the timesteps are those of the distillation, and a timestep has a successor
        "set_alpha_to_one": options.unused(True),
        "timestep_spacing": options.unused("leading"),
        "steps_offset": options.unused(0),
    }
    draws_noise = True

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        distilled = self.options["original_inference_steps"]
        if distilled > self.train_steps or steps > distilled:
            most = min(distilled, self.train_steps)
            raise ConfigError(
                f"{steps} steps are impossible with original_inference_steps={distilled}",
                hint=f"choose from 1 to {most}; latent consistency models are made for 1 to 8",
            )
        schedule = np.arange(distilled, 0, -1) * (self.train_steps // distilled) - 1
        picked = np.floor(np.linspace(0, distilled, steps, endpoint=False)).astype(np.int64)
        self._use(schedule[picked])
        self._refuse_pure_noise()

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        timestep = int(self.timesteps[index])
        alpha_bar = float(self.alphas_cumprod[timestep])
        original = denoised(self.prediction_type, output, sample, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))
        scaled = timestep * float(self.options["timestep_scaling"])
        variance = scaled**2 + SIGMA_DATA**2
        clean = (scaled / math.sqrt(variance)) * self._clip(original) + (SIGMA_DATA**2 / variance) * sample
        if index == self.steps - 1:
            return clean
        following = float(self.alphas_cumprod[self.timesteps[index + 1]])
        return math.sqrt(following) * clean + math.sqrt(1 - following) * drawn(noise)
