"""Euler."""

from __future__ import annotations

from typing import ClassVar

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array
from mtu_compile.runtime.schedulers.sigmas import BOUND, VarianceExploding


class Euler(VarianceExploding):
    """Euler's method on the probability-flow ODE, without churn: Karras et al. 2022, algorithm 2."""

    name = "euler"
    diffusers_class = "EulerDiscreteScheduler"
    declared: ClassVar = {
        **options.training(),
        **options.spacing("linspace"),
        **options.SPREADS,
        "prediction_type": options.one_of("epsilon", "v_prediction", "sample", reads={"original_sample": "sample"}),
        "interpolation_type": options.neutral("linear"),
        "timestep_type": options.neutral("discrete"),
        "sigma_min": BOUND,
        "sigma_max": BOUND,
        "final_sigmas_type": options.one_of("zero", "sigma_min"),
        "rescale_betas_zero_snr": options.flag(False),
    }

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        sigma, following = float(self.sigmas[index]), float(self.sigmas[index + 1])
        return self._advance(output, sample, sigma, following - sigma)
