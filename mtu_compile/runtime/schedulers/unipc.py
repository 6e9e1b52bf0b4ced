"""UniPC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.core.errors import ConfigError
from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array
from mtu_compile.runtime.schedulers.sigmas import BOUND
from mtu_compile.runtime.schedulers.solvers import Solver


def _steps(value: Any) -> list[int]:
    if not isinstance(value, (list, tuple)) or any(type(one) is not int for one in value):
        raise ValueError
    return list(value)


class UniPC(Solver):
    """The unified predictor and corrector: Zhao et al. 2023 (arXiv:2302.04867), algorithms 1 and 2.

    The prediction of a step corrects the step before it, at no further UNet call.
    """

    name = "unipc"
    diffusers_class = "UniPCMultistepScheduler"
    declared: ClassVar = {
        **options.training(),
        **options.spacing("linspace"),
        **options.NO_THRESHOLDING,
        **options.NO_FLOW,
        **options.SPREADS,
        "prediction_type": options.one_of("epsilon", "v_prediction", "sample"),
        "solver_order": options.count(2, 1, 3),
        "solver_type": options.one_of("bh2", "bh1", reads=dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")),
        "predict_x0": options.neutral(True),
        "solver_p": options.neutral(None),
        "lower_order_final": options.flag(True),
        "disable_corrector": options.Option([], "a list of steps", _steps),
        "final_sigmas_type": options.one_of("zero", "sigma_min"),
        "rescale_betas_zero_snr": options.flag(False),
        "sigma_min": BOUND,
        "sigma_max": BOUND,
        "shift_terminal": options.neutral(None),
    }

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        ends_flat = self.sigmas[-1] in (0.0, self.sigmas[-2])
        if ends_flat and not self.options["lower_order_final"] and min(self.options["solver_order"], steps) > 1:
            raise ConfigError(
                "the unipc sampler does not implement lower_order_final=False with this final sigma",
                hint="set lower_order_final to true, or choose another one with --scheduler",
            )
        self._history: list[Array] = []
        self._order = 0
        self._corrected: Array | None = None

    def _last_sigma(self, training: float, spread: float) -> float:
        if self.options["final_sigmas_type"] == "zero":
            return 0.0
        return spread if self._spread else training

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        original = self._denoised(output, index, sample)
        if self._corrected is not None and index - 1 not in self.options["disable_corrector"]:
            sample = self._update(index - 1, self._corrected, self._order, original)
        self._history = [original, *self._history[:2]]
        allowed = self.options["solver_order"]
        if self.options["lower_order_final"]:
            allowed = min(allowed, len(self.timesteps) - index)
        self._order = min(allowed, len(self._history))
        self._corrected = sample
        return self._update(index, sample, self._order, None)

    def _update(self, start: int, sample: Array, order: int, arrived: Array | None) -> Array:
        """From ``sigmas[start]`` to the next: predicted, or corrected by what was predicted on arrival.

        ``self._history`` begins with the prediction at ``start``.
        """
        newest, end = self._history[0], start + 1
        h = self._lambda(end) - self._lambda(start)
        alpha = self._alpha(end)
        phi = math.expm1(-h)
        stepped = self._transition(start, end) * sample - (alpha * phi) * newest
        if h == 0 or (order == 1 and arrived is None):
            return stepped
        scale = -h if self.options["solver_type"] == "bh1" else phi
        ratios = [(self._lambda(start - i) - self._lambda(start)) / h for i in range(1, order)]
        slopes = [(self._history[i] - newest) / ratio for i, ratio in enumerate(ratios, start=1)]
        if arrived is not None:
            ratios, slopes = [*ratios, 1.0], [*slopes, arrived - newest]
        for weight, slope in zip(self._weights(ratios, -h, scale, exact=arrived is not None), slopes, strict=True):
            stepped -= (alpha * scale * weight) * slope
        return stepped

    @staticmethod
    def _weights(ratios: list[float], h: float, scale: float, *, exact: bool) -> list[float]:
        """Weights of the slopes: equation 5 of the paper; of the first order 1/2, as its authors have it."""
        count = len(ratios)
        if count == 1:
            return [0.5]
        phi, factorial, right = math.expm1(h) / h - 1, 1, []
        for i in range(1, count + 1):
            right.append(phi * factorial / scale)
            factorial *= i + 1
            phi = phi / h - 1 / factorial
        powers = np.vander(np.array(ratios), count, increasing=True).T
        return [float(weight) for weight in np.linalg.solve(powers, np.array(right))]
