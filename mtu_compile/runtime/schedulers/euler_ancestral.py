"""Euler with fresh noise at every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array, drawn
from mtu_compile.runtime.schedulers.sigmas import VarianceExploding


def ancestral(sigmas: Array) -> tuple[Array, Array]:
    """How far down each step goes, and how much fresh noise takes it up again to the next sigma.

    The squares of both add up to the square of the next sigma. Computed in float32 as diffusers does: the difference of
    two nearly equal squares is off by a third of a percent there, with zero terminal SNR.

    Args:
        sigmas: [n + 1].

    Returns:
        down, up: [n] float64 values with float32's rounding.
    """
    here, following = sigmas[:-1].astype(np.float32), sigmas[1:].astype(np.float32)
    up = np.sqrt(following**2 * (here**2 - following**2) / here**2)
    down = np.sqrt(np.maximum(following**2 - up**2, 0))  # where rounding makes it negative, diffusers' is NaN
    return down.astype(np.float64), up.astype(np.float64)


class EulerAncestral(VarianceExploding):
    """Ancestral sampling with Euler steps, as in k-diffusion (``sample_euler_ancestral``)."""

    name = "euler-a"
    diffusers_class = "EulerAncestralDiscreteScheduler"
    declared: ClassVar = {
        **options.training(),
        **options.spacing("linspace"),
        "prediction_type": options.one_of("epsilon", "v_prediction"),
        "rescale_betas_zero_snr": options.flag(False),
    }
    draws_noise = True

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self._down, self._up = ancestral(self.sigmas)

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        sigma = float(self.sigmas[index])
        lower = self._advance(output, sample, sigma, float(self._down[index]) - sigma)
        return lower + float(self._up[index]) * drawn(noise)
