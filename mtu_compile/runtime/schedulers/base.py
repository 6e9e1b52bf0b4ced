"""What every sampler is: one trajectory, asked step by step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import ConfigError
from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.noise_schedule import alphas_cumprod

Array = NDArray[Any]


class Scheduler(ABC):
    """One denoising trajectory.

    Attributes:
        name: how the sampler is asked for.
        diffusers_class: its namesake.
        declared: all options of its namesake.
        steps: what was asked for. Some samplers call the UNet more often: ``len(timesteps)`` times.
        timesteps: [calls], what the UNet is told at each call (int64, or float32 for samplers in between timesteps).
        init_noise_sigma: what unit noise is multiplied by to start with.
        draws_noise: whether ``step`` needs fresh noise.

    Raises:
        ConfigError: the configuration asks for what is not implemented, or the number of steps is impossible.
    """

    name: ClassVar[str]
    diffusers_class: ClassVar[str]
    declared: ClassVar[options.Options]

    timesteps: Array
    init_noise_sigma: float = 1.0
    draws_noise: bool = False

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        self.options = self.read(config)
        self.train_steps: int = self.options["num_train_timesteps"]
        if not 1 <= steps <= self.train_steps:
            raise ConfigError(f"{steps} steps are impossible", hint=f"choose from 1 to {self.train_steps}")
        self.steps = steps
        self.prediction_type: str = self.options["prediction_type"]
        self.alphas_cumprod = alphas_cumprod(self.options)
        # the last is 0 with zero terminal SNR, which the samplers that have it are ready for
        if not (self.alphas_cumprod[: -1 if self.options.get("rescale_betas_zero_snr") else None] > 0).all():
            raise ConfigError(
                f"the noise schedule leaves nothing of a picture: beta_end={self.options['beta_end']}, "
                f"num_train_timesteps={self.train_steps}",
                hint="fetch the model again",
            )

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The sampler's options as ``config`` has them; ``ConfigError`` for what is not implemented."""
        return options.read(cls.name, cls.declared, config)

    def _spaced(self, count: int) -> Array:
        """``count`` timesteps of the training schedule, descending, float64 (Lin et al. 2023, table 2)."""
        spacing = self.options["timestep_spacing"]
        if spacing == "linspace":
            return np.linspace(0, self.train_steps - 1, count)[::-1]
        if spacing == "leading":
            return np.arange(count)[::-1] * float(self.train_steps // count) + float(self.options["steps_offset"])
        # diffusers takes one step too many, at timestep -1, where 1000 / steps rounds badly (61, 103, 121, …)
        return np.arange(self.train_steps, 0, -self.train_steps / count)[:count].round() - 1

    def _use(self, timesteps: Array) -> None:
        """Set ``timesteps``; ``ConfigError`` if one lies outside of the training schedule."""
        largest = float(timesteps.max())
        if largest > self.train_steps - 1:
            offset = self.options.get("steps_offset", 0)
            raise ConfigError(
                f"{self.steps} steps with steps_offset={offset} start at timestep {largest:g} of {self.train_steps}",
                hint="take fewer steps",
            )
        self.timesteps = timesteps

    def _refuse_steps(self, why: str) -> ConfigError:
        return ConfigError(f"the {self.name} sampler cannot take {self.steps} steps here: {why}", hint="take fewer")

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """What the UNet sees of ``sample`` [B, C, h, w] at call ``index``."""
        return sample

    @abstractmethod
    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        """The next sample.

        Args:
            output: [B, C, h, w] float32, the (guided) prediction of the UNet.
            index: which call this is, 0 … len(timesteps) - 1, in order.
            sample: [B, C, h, w] float32, before ``scale_model_input``.
            noise: [B, C, h, w] float32, independent and of unit variance, where ``draws_noise``.
        """


def drawn(noise: Array | None) -> Array:
    """``noise``, which a sampler with ``draws_noise`` was to be given."""
    if noise is None:
        raise ValueError("this sampler needs fresh noise at every step")
    return noise


def denoised(prediction: str, output: Array, sample: Array, alpha: float, sigma: float) -> Array:
    """The clean latent, where ``sample`` = alpha · clean + sigma · noise with alpha² + sigma² = 1."""
    if prediction == "epsilon":
        return (sample - sigma * output) / alpha
    if prediction == "v_prediction":
        return alpha * sample - sigma * output
    return output
