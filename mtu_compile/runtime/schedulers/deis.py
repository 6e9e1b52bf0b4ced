"""DEIS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array
from mtu_compile.runtime.schedulers.solvers import FEW_STEPS, Solver


class DEIS(Solver):
    """Multistep DEIS in log rho: Zhang and Chen 2022 (arXiv:2204.13902), section 4."""

    name = "deis"
    diffusers_class = "DEISMultistepScheduler"
    declared: ClassVar = {
        **options.training(),
        **options.spacing("linspace"),
        **options.NO_THRESHOLDING,
        **options.NO_FLOW,
        **options.SPREADS,
        "prediction_type": options.one_of("epsilon", "v_prediction", "sample"),
        "solver_order": options.count(2, 1, 3),
        "algorithm_type": options.one_of("deis", reads=dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis")),
        "solver_type": options.one_of("logrho", reads=dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho")),
        "lower_order_final": options.flag(True),
    }

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        few = self.options["lower_order_final"] and len(self.timesteps) < FEW_STEPS
        #: Highest order of the last but one and of the last step.
        self._final_orders = (2, 1) if few else (3, 3)
        self._history: list[Array] = []

    def _last_sigma(self, training: float, spread: float) -> float:
        return spread if self._spread else training

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        alpha, sigma = self._alpha(index), float(self.sigmas[index])
        original = self._denoised(output, index, sample)
        self._history = [(sample - alpha * original) / (sigma * alpha), *self._history[:2]]
        remaining = len(self.timesteps) - index
        allowed = self._final_orders[-remaining] if remaining <= 2 else 3
        order = min(self.options["solver_order"], len(self._history), allowed)
        following, next_alpha = float(self.sigmas[index + 1]), self._alpha(index + 1)
        if order == 1:
            h = math.log(sigma / following)
            return (next_alpha / alpha) * sample - (following * next_alpha * math.expm1(h)) * self._history[0]
        stepped = sample / alpha
        for weight, past in zip(self._weights(index, order), self._history, strict=False):
            stepped += weight * past
        return next_alpha * stepped

    def _weights(self, index: int, order: int) -> list[float]:
        """Integrals over rho of the Lagrange polynomials in log rho, newest prediction first.

        In float32 and in diffusers' order of operations: it takes differences of large numbers, whose rounding shows.
        """
        sigmas = self.sigmas[index + 1 - order : index + 2].astype(np.float32)[::-1]
        alphas = np.float32(1) / np.sqrt(sigmas * sigmas + np.float32(1))
        rho = (sigmas * alphas) / alphas
        end, known = rho[0], [rho[1 + i] for i in range(order)]
        integral = _second if order == 2 else _third
        turned = [known[i:] + known[:i] for i in range(order)]
        return [float(integral(end, *nodes) - integral(known[0], *nodes)) for nodes in turned]


def _second(t: Any, b: Any, c: Any) -> Any:
    """∫ (log t - log c) / (log b - log c) dt."""
    return t * (-np.log(c) + np.log(t) - 1) / (np.log(b) - np.log(c))


def _third(t: Any, b: Any, c: Any, d: Any) -> Any:
    """∫ (log t - log c)(log t - log d) / ((log b - log c)(log b - log d)) dt."""
    at, over_c, over_d = np.log(t), np.log(c), np.log(d)
    above = t * (over_c * (over_d - at + 1) - over_d * at + over_d + at**2 - 2 * at + 2)
    return above / ((np.log(b) - over_c) * (np.log(b) - over_d))
