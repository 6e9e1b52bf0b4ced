"""DDIM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.alphas import AlphaScheduler
from mtu_compile.runtime.schedulers.base import Array, denoised


class DDIM(AlphaScheduler):
    """Deterministic DDIM (eta = 0): Song et al. 2021, equation 12."""

    name = "ddim"
    diffusers_class = "DDIMScheduler"
    declared: ClassVar = {
        **options.training(),
        **options.spacing("leading"),
        **options.NO_THRESHOLDING,
        "prediction_type": options.one_of("epsilon", "v_prediction", "sample"),
        "clip_sample": options.flag(True),
        "clip_sample_range": options.number(1.0, 0, 1e6),
        "set_alpha_to_one": options.flag(True),
        "rescale_betas_zero_snr": options.flag(False),
    }

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self._use(self._spaced(steps).round().astype(np.int64))
        self._refuse_pure_noise()
        final = 1.0 if self.options["set_alpha_to_one"] else self.alphas_cumprod[0]
        # The neighbour is counted on the training schedule and may differ from the next timestep, as in diffusers.
        previous = self.timesteps - self.train_steps // steps
        self._alpha = self.alphas_cumprod[self.timesteps].astype(np.float64)
        self._alpha_previous = np.where(previous >= 0, self.alphas_cumprod[previous], final).astype(np.float64)

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        alpha, sigma = math.sqrt(self._alpha[index]), math.sqrt(1 - self._alpha[index])
        original = denoised(self.prediction_type, output, sample, alpha, sigma)
        if self.prediction_type == "epsilon":
            epsilon = output
        elif self.prediction_type == "v_prediction":
            epsilon = alpha * output + sigma * sample
        else:
            epsilon = (sample - alpha * output) / sigma
        previous = float(self._alpha_previous[index])
        return math.sqrt(previous) * self._clip(original) + math.sqrt(1 - previous) * epsilon
