"""The noise schedule a model was trained with, with torch's rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

#: Values of ``beta_schedule`` that ``alphas_cumprod`` knows.
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

#: Stands for alpha_bar = 0 at the last timestep where a sigma has to be finite; diffusers uses fp16's smallest
#: subnormal (``scheduling_euler_discrete.py``).
ALMOST_ZERO = 2.0**-24


def alphas_cumprod(options: Mapping[str, Any]) -> Array:
    """alpha_bar of every timestep, [T] float32.

    diffusers computes it in float32, and 1 - alpha_bar loses four digits at the first timesteps: without the same
    rounding the sigmas there would differ by 1e-5.

    Args:
        options: ``num_train_timesteps``, ``beta_start``, ``beta_end``, ``beta_schedule`` (one of ``BETA_SCHEDULES``),
            ``trained_betas``, and ``rescale_betas_zero_snr`` where the sampler has it.
    """
    betas = _betas(options)
    if options.get("rescale_betas_zero_snr"):
        betas = _zero_terminal_snr(betas)
    return _cumprod(np.float32(1) - betas)


def _betas(options: Mapping[str, Any]) -> Array:
    """Noise variances, [T] float32."""
    if options["trained_betas"] is not None:
        return np.asarray(options["trained_betas"], dtype=np.float32)
    steps, schedule = options["num_train_timesteps"], options["beta_schedule"]
    start, end = options["beta_start"], options["beta_end"]
    if schedule == "linear":
        return _linspace(start, end, steps)
    if schedule == "scaled_linear":
        return _linspace(start**0.5, end**0.5, steps) ** 2
    assert schedule == "squaredcos_cap_v2"

    def alpha_bar(t: float) -> float:  # Nichol and Dhariwal 2021, equation 17
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    ratios = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return np.array([min(1 - ratio, 0.999) for ratio in ratios], dtype=np.float32)


def _linspace(start: float, end: float, steps: int) -> Array:
    """``torch.linspace`` in float32, bit for bit: counted from both ends, multiply and add rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(steps - 1, 1)))
    i = np.arange(steps)
    return np.where(i < steps // 2, first + step * i, last - step * (steps - 1 - i)).astype(np.float32)


def _cumprod(alphas: Array) -> Array:
    """``torch.cumprod`` of float32 on a CPU, which accumulates in float64."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(betas: Array) -> Array:
    """Shift and scale the schedule so that the last timestep is pure noise (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alpha_bar = root**2
    alphas = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return np.float32(1) - alphas
