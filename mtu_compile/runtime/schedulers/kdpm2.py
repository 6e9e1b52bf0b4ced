"""DPM-Solver-2 as in k-diffusion, with and without fresh noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array, drawn
from mtu_compile.runtime.schedulers.euler_ancestral import ancestral
from mtu_compile.runtime.schedulers.sigmas import VarianceExploding, interpolate_timesteps

_DECLARED: options.Options = {
    **options.training(0.00085, 0.012),
    **options.spacing("linspace"),
    **options.SPREADS,
    "prediction_type": options.one_of("epsilon", "v_prediction"),
}


class KDPM2(VarianceExploding):
    """The midpoint method in log sigma: Karras et al. 2022, algorithm 2, with the sampler of Lu et al. 2022.

    Every step but the last, which ends at zero, calls the UNet twice: 2 · ``steps`` - 1 calls.
    """

    name = "kdpm2"
    diffusers_class = "KDPM2DiscreteScheduler"
    declared: ClassVar = _DECLARED

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        ends = self._ends()
        with np.errstate(divide="ignore"):
            logs = np.log(self.sigmas[:-1].astype(np.float32)), np.log(ends.astype(np.float32))
        #: Between the beginning of a step and its end; 0 in the last step, which is Euler's.
        self._middles = np.exp(logs[0] - (logs[0] - logs[1]) / 2).astype(np.float64)
        self._ends_at = ends
        between = interpolate_timesteps(self._middles[:-1], np.log(self._training_sigmas())).astype(np.float32)
        self.timesteps = np.append(np.stack([self.timesteps[:-1], between], axis=1).ravel(), self.timesteps[-1:])
        self._start: Array | None = None

    def _between(self, timesteps: Array) -> Array:
        return timesteps.round() if self._spread == "use_karras_sigmas" else timesteps

    def _ends(self) -> Array:
        """[n] sigma each step goes down to."""
        return self.sigmas[1:]

    def _input_sigma(self, index: int) -> float:
        return float(self._middles[index // 2] if index % 2 else self.sigmas[index // 2])

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        step = index // 2
        sigma, middle = float(self.sigmas[step]), float(self._middles[step])
        if index % 2 == 0:
            self._start = sample
            return self._advance(output, sample, sigma, middle - sigma)
        assert self._start is not None
        return self._start + (float(self._ends_at[step]) - sigma) * self._derivative(output, sample, middle)


class KDPM2Ancestral(KDPM2):
    """``KDPM2`` that goes down further than the next sigma and adds noise to come up to it."""

    name = "kdpm2-a"
    diffusers_class = "KDPM2AncestralDiscreteScheduler"
    declared: ClassVar = _DECLARED
    draws_noise = True

    def _ends(self) -> Array:
        down, self._up = ancestral(self.sigmas)
        return down

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        stepped = super().step(output, index, sample)
        return stepped + float(self._up[index // 2]) * drawn(noise) if index % 2 else stepped
