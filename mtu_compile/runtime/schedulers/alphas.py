"""What samplers on the training schedule itself share (DDIM, DDPM, PNDM, LCM)."""

from __future__ import annotations

import numpy as np

from mtu_compile.core.errors import ConfigError
from mtu_compile.runtime.schedulers.base import Array, Scheduler


class AlphaScheduler(Scheduler):
    """A sampler that reads alpha_bar at whole timesteps."""

    def _clip(self, original: Array) -> Array:
        """Clipped to the range of pixels where ``clip_sample`` asks for it."""
        if not self.options["clip_sample"]:
            return original
        limit = self.options["clip_sample_range"]
        return np.clip(original, -limit, limit)

    def _refuse_pure_noise(self) -> None:
        """``ConfigError`` if the noise of the first timestep would have to be told from a sample that is all noise."""
        if self.prediction_type == "epsilon" and self.alphas_cumprod[self.timesteps[0]] == 0:
            raise ConfigError(
                f"{self.name} cannot start from pure noise (rescale_betas_zero_snr) with an epsilon-predicting model",
                hint="choose the euler or dpm++ sampler, or leading timesteps",
            )
