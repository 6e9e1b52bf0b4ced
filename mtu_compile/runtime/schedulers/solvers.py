"""What the exponential integrators share: DPM-Solver++, DEIS and UniPC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mtu_compile.runtime.schedulers.base import Array, denoised
from mtu_compile.runtime.schedulers.sigmas import SigmaScheduler, interpolate_timesteps

#: Trajectories shorter than this end with steps of lower order (``lower_order_final``); diffusers' number.
FEW_STEPS = 15


class Solver(SigmaScheduler):
    """A sampler for ``sample`` = alpha · clean + (sigma · alpha) · noise, alpha = 1 / sqrt(sigma² + 1).

    ``sigmas`` are ratios of noise to signal, and lambda = -log(sigma) is what the steps are measured in.
    """

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        training = self._training_sigmas()
        timesteps = self._whole_timesteps(self._last_timestep(training))
        sigmas: Array
        if self._spread:
            sigmas = self._spread_sigmas(float(training[-1]), float(training[0]), steps)
            timesteps = self._told(interpolate_timesteps(sigmas, np.log(training))).astype(np.int64)
        else:
            sigmas = np.interp(timesteps, np.arange(self.train_steps), training)
        self._use(timesteps)
        self._set_sigmas(sigmas, self._last_sigma(float(training[0]), float(sigmas[-1])))

    def _last_timestep(self, training: Array) -> int:
        """One more than the noisiest timestep that is used."""
        return self.train_steps

    def _whole_timesteps(self, last: int) -> Array:
        """int64, descending; without the 0 that ``linspace`` and ``leading`` would end with."""
        spacing, steps = self.options["timestep_spacing"], self.steps
        spaced: Array
        if spacing == "linspace":
            spaced = np.linspace(0, last - 1, steps + 1)[:0:-1]
        elif spacing == "leading":
            spaced = np.arange(steps, 0, -1) * (last // (steps + 1)) + float(self.options["steps_offset"])
        else:
            spaced = np.arange(last, 0, -self.train_steps / steps)[:steps].round() - 1
            spaced = spaced[spaced >= 0]
        return np.asarray(spaced.round().astype(np.int64))

    def _told(self, timesteps: Array) -> Array:
        """What the UNet is told, before it is cut to whole numbers, where sigmas lie between timesteps."""
        return timesteps.round() if self._spread == "use_karras_sigmas" else timesteps

    def _last_sigma(self, training: float, spread: float) -> float:
        """What the trajectory ends with.

        Args:
            training: the least sigma of the training schedule.
            spread: the last sigma at which the UNet is called.
        """
        return 0.0 if self.options["final_sigmas_type"] == "zero" else training

    def _alpha(self, index: int) -> float:
        return 1 / math.sqrt(float(self.sigmas[index]) ** 2 + 1)

    def _lambda(self, index: int) -> float:
        sigma = float(self.sigmas[index])
        return -math.log(sigma) if sigma else math.inf

    def _denoised(self, output: Array, index: int, sample: Array) -> Array:
        alpha = self._alpha(index)
        return denoised(self.prediction_type, output, sample, alpha, float(self.sigmas[index]) * alpha)

    def _transition(self, start: int, end: int) -> float:
        """How much of a sample is left when its noise shrinks from one sigma to another."""
        return float(self.sigmas[end]) * self._alpha(end) / (float(self.sigmas[start]) * self._alpha(start))


def last_timestep(training: Array, least_lambda: float) -> int:
    """One more than the noisiest timestep whose lambda is at least ``least_lambda`` (``lambda_min_clipped``).

    Args:
        training: [T] float32, the training schedule's sigmas, ascending.
    """
    alpha = 1 / np.sqrt(training.astype(np.float64) ** 2 + 1)
    lambdas = (np.log(alpha) - np.log(training * alpha)).astype(np.float32)
    return len(training) - int(np.searchsorted(lambdas[::-1], np.float32(least_lambda)))


def dpm_step(
    kind: Literal["midpoint", "heun"],
    order: int,
    *,
    transition: float,
    alpha: float,
    noise_level: float,
    h: float,
    sample: Array,
    differences: tuple[Array, ...],
    noise: Array | None,
) -> Array:
    """One step of DPM-Solver++ from the Taylor expansion of the clean latent in lambda.

    Lu et al. 2022 (arXiv:2211.01095), equations 12 and B.4 to B.6; the stochastic variant (with ``noise``) is the same
    with twice the step, and what is lost put back as noise.

    Args:
        kind: how the first difference of a second-order step is weighted: a half, or as the integral has it.
        order: of the step; diffusers' third-order midpoint step has the first difference alone.
        transition: what is left of ``sample``.
        alpha, noise_level: signal and noise at the end of the step.
        h: the step in lambda.
        sample: where it starts.
        differences: the clean latent, and its first and second differences where known.
        noise: fresh noise, or ``None``.
    """
    if h == 0:
        return sample
    length = h if noise is None else 2 * h
    gain = -math.expm1(-length)
    kept = transition if noise is None else transition * math.exp(-h)
    stepped = kept * sample + (alpha * gain) * differences[0]
    if len(differences) > 1:
        half = kind == "midpoint" and order == 2
        stepped += (alpha * (gain / 2 if half else 1 - gain / length)) * differences[1]
    if len(differences) > 2:
        # The two halves have different signs in diffusers, too.
        curve = (gain - length) / length**2 + (0.5 if noise is None else -0.5)
        stepped += (alpha * curve) * differences[2]
    return stepped if noise is None else stepped + (noise_level * math.sqrt(gain)) * noise
