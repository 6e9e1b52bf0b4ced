"""Heun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array
from mtu_compile.runtime.schedulers.sigmas import VarianceExploding


class Heun(VarianceExploding):
    """Heun's second-order method, without churn: Karras et al. 2022, algorithm 1.

    Every step but the last, which ends at zero, calls the UNet twice: 2 · ``steps`` - 1 calls.
    """

    name = "heun"
    diffusers_class = "HeunDiscreteScheduler"
    declared: ClassVar = {
        **options.training(0.00085, 0.012),
        **options.spacing("linspace"),
        **options.SPREADS,
        "prediction_type": options.one_of("epsilon", "v_prediction", "sample"),
        "clip_sample": options.flag(False),
        "clip_sample_range": options.number(1.0, 0, 1e6),
    }

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self.timesteps = np.concatenate([self.timesteps[:1], self.timesteps[1:].repeat(2)])
        self._begun: tuple[Array, Array] | None = None

    def _input_sigma(self, index: int) -> float:
        return float(self.sigmas[(index + 1) // 2])

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        slope = self._clipped_derivative(output, sample, self._input_sigma(index))
        first = index // 2
        change = float(self.sigmas[first + 1] - self.sigmas[first])
        if index % 2 == 0:
            self._begun = sample, slope
            return sample + change * slope
        assert self._begun is not None
        start, before = self._begun
        return start + change * ((before + slope) / 2)

    def _clipped_derivative(self, output: Array, sample: Array, sigma: float) -> Array:
        slope = self._derivative(output, sample, sigma)
        if not self.options["clip_sample"]:
            return slope
        limit = self.options["clip_sample_range"]
        return (sample - np.clip(sample - sigma * slope, -limit, limit)) / sigma
