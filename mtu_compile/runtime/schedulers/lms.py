"""Linear multistep in sigma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array
from mtu_compile.runtime.schedulers.sigmas import VarianceExploding

#: Derivatives the polynomial goes through; the default of diffusers' pipelines.
ORDER = 4


class LMS(VarianceExploding):
    """Adams-Bashforth over uneven sigmas, of order 4, as in k-diffusion (``sample_lms``)."""

    name = "lms"
    diffusers_class = "LMSDiscreteScheduler"
    declared: ClassVar = {
        **options.training(),
        **options.spacing("linspace"),
        **options.SPREADS,
        "prediction_type": options.one_of("epsilon", "v_prediction", "sample"),
    }

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self._derivatives: list[Array] = []

    def _spread_sigmas(self, largest: float, smallest: float, count: int) -> Array:
        if self._spread == "use_karras_sigmas":  # diffusers' LMS, unlike the others, asks for no bounds there
            self._bounds = dict.fromkeys(self._bounds)
        return super()._spread_sigmas(largest, smallest, count)

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        slope = self._derivative(output, sample, float(self.sigmas[index]))
        self._derivatives = [slope, *self._derivatives[: ORDER - 1]]
        for weight, past in zip(self._weights(index, len(self._derivatives)), self._derivatives, strict=True):
            sample = sample + weight * past
        return sample

    def _weights(self, index: int, order: int) -> list[float]:
        """Integrals of the Lagrange polynomials from this sigma to the next, newest derivative first."""
        begin, end = self.sigmas[index], self.sigmas[index + 1]
        nodes, shares = np.polynomial.legendre.leggauss(2)  # exact to the third degree
        points = (begin + end) / 2 + nodes * (end - begin) / 2
        known = self.sigmas[index - order + 1 : index + 1][::-1]
        weights = []
        for i in range(order):
            others = np.delete(known, i)
            values = np.prod((points[:, None] - others) / (known[i] - others), axis=1)
            weights.append(float(shares @ values * (end - begin) / 2))
        return weights
