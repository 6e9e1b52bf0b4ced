"""Pseudo numerical methods: PLMS, which Stable Diffusion 1.x ships with, and with Runge-Kutta steps before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.alphas import AlphaScheduler
from mtu_compile.runtime.schedulers.base import Array

#: Adams-Bashforth, newest prediction first, by how many there are (Liu et al. 2022, equations 9 and 12).
MULTISTEP = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}

#: UNet calls of the Runge-Kutta start: three steps of four calls.
RUNGE_KUTTA_CALLS = 12


class PNDM(AlphaScheduler):
    """Liu et al. 2022 (arXiv:2202.09778).

    With ``skip_prk_steps`` the first step is taken twice (Euler, then Heun), so the UNet is called ``steps`` + 1 times;
    without, the first three steps are Runge-Kutta's with four calls each, ``steps`` + 9 in all.
    """

    name = "pndm"
    diffusers_class = "PNDMScheduler"
    declared: ClassVar = {
        **options.training(),
        **options.spacing("leading"),
        "prediction_type": options.one_of("epsilon", "v_prediction"),
        "skip_prk_steps": options.flag(False),
        "set_alpha_to_one": options.flag(False),
    }

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        spaced = self._spaced(steps).round().astype(np.int64)
        self._stride = self.train_steps // steps
        self._runge_kutta = not self.options["skip_prk_steps"]
        if self._runge_kutta:
            if steps < 4:
                raise self._refuse_steps("it begins with three steps of Runge and Kutta (skip_prk_steps=false)")
            halves = np.stack([spaced[:4] + self._stride // 2, spaced[:4]], axis=1).ravel()
            start = halves[1:].repeat(2)[1:-1]
            self._use(np.concatenate([start, spaced[3:]]))
        else:
            self._use(np.concatenate([spaced[:2], spaced[1:2], spaced[2:]]))
        self._predictions: list[Array] = []
        self._held: Array | None = None
        self._sum: Array | float = 0.0

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        if self._runge_kutta and index < RUNGE_KUTTA_CALLS:
            return self._runge_kutta_call(output, index, sample)
        timestep = int(self.timesteps[index])
        following = timestep - self._stride
        if index == 1:  # the first step again, with the mean of both ends; its prediction is not kept
            assert self._held is not None
            sample = self._held
            timestep, following = timestep + self._stride, timestep
            output = (output + self._predictions[-1]) / 2
            return self._transfer(sample, timestep, following, output)
        self._predictions = [*self._predictions[-3:], output]
        if index == 0:
            self._held = sample
            return self._transfer(sample, timestep, following, output)
        weights = MULTISTEP[len(self._predictions)]
        mixed: Array = sum(w * past for w, past in zip(weights, reversed(self._predictions), strict=True))  # type: ignore[assignment]
        return self._transfer(sample, timestep, following, mixed)

    def _runge_kutta_call(self, output: Array, index: int, sample: Array) -> Array:
        stage = index % 4
        timestep = int(self.timesteps[index - stage])
        following = int(self.timesteps[index]) - (0 if index % 2 else self._stride // 2)
        if stage == 0:
            self._predictions.append(output)
            self._held, self._sum = sample, 0.0
        self._sum = self._sum + output / (6 if stage in (0, 3) else 3)
        assert self._held is not None
        return self._transfer(self._held, timestep, following, self._sum if stage == 3 else output)  # type: ignore[arg-type]

    def _transfer(self, sample: Array, timestep: int, following: int, output: Array) -> Array:
        """From one timestep to another along the prediction: equation 11 of the paper."""
        alpha = float(self.alphas_cumprod[timestep])
        final = 1.0 if self.options["set_alpha_to_one"] else float(self.alphas_cumprod[0])
        previous = float(self.alphas_cumprod[following]) if following >= 0 else final
        if self.prediction_type == "v_prediction":
            output = math.sqrt(alpha) * output + math.sqrt(1 - alpha) * sample
        divisor = alpha * math.sqrt(1 - previous) + math.sqrt(alpha * (1 - alpha) * previous)
        return math.sqrt(previous / alpha) * sample - ((previous - alpha) / divisor) * output
