"""Samplers in numpy: DDIM, Euler and DPM-Solver++(2M), each equal to its namesake in diffusers.

A scheduler is made for one trajectory (a configuration and a number of steps) and is then asked step by step, by
index. All of them read the configuration diffusers writes to ``scheduler_config.json``, whichever class wrote it, and
take from it what ``from_config`` of their diffusers namesake would take: options that class does not have are ignored,
options it has and this module does not implement are refused.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import ConfigError

Array = NDArray[Any]

#: Stands for alpha_bar = 0 at the last timestep where a sigma has to be finite; diffusers uses fp16's smallest
#: subnormal (``scheduling_euler_discrete.py``).
ALMOST_ZERO = 2.0**-24


def _betas(config: Mapping[str, Any]) -> Array:
    """Noise variances of the training schedule, [T] float32, with torch's rounding.

    diffusers computes them in float32, and 1 - alpha_bar loses four digits at the first timesteps: without the same
    rounding the sigmas there would differ by 1e-5.
    """
    steps = int(config.get("num_train_timesteps", 1000))
    schedule = config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if schedule == "linear":
        betas = _linspace(start, end, steps)
    elif schedule == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, steps) ** 2
    elif schedule == "squaredcos_cap_v2":

        def alpha_bar(t: float) -> float:  # Nichol and Dhariwal 2021, equation 17
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        ratios = [alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
        betas = np.array([min(1 - ratio, 0.999) for ratio in ratios], dtype=np.float32)
    else:
        raise ConfigError(
            f"the scheduler's beta_schedule {schedule!r} is not implemented",
            hint="known: linear, scaled_linear, squaredcos_cap_v2",
        )
    return _zero_terminal_snr(betas) if config.get("rescale_betas_zero_snr") else betas


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


class Scheduler(ABC):
    """One denoising trajectory of ``steps`` steps.

    Attributes:
        name: how the sampler is asked for.
        timesteps: [steps], what the UNet is told at each step (int64, or float32 for Euler).
        init_noise_sigma: what unit noise is multiplied by to start with.

    Raises:
        ConfigError: the configuration asks for what is not implemented, or the number of steps is impossible.
    """

    name: ClassVar[str]
    diffusers_class: ClassVar[str]
    #: Option → the values this module implements (``None`` in the configuration always counts as unset).
    implemented: ClassVar[Mapping[str, tuple[Any, ...]]]
    default_spacing: ClassVar[str]

    timesteps: Array
    init_noise_sigma: float = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        unset = config.get("_use_default_values", ())  # diffusers lets each class use its own default for these
        self.config = {k: v for k, v in config.items() if k not in unset and v is not None}
        self._refuse_unimplemented()
        self.train_steps = int(self.config.get("num_train_timesteps", 1000))
        if not 1 <= steps <= self.train_steps:
            raise ConfigError(f"{steps} steps are impossible", hint=f"choose from 1 to {self.train_steps}")
        self.steps = steps
        self.prediction_type = str(self.config.get("prediction_type", "epsilon"))
        self.spacing = str(self.config.get("timestep_spacing", self.default_spacing))
        self.alphas_cumprod = _cumprod(np.float32(1) - _betas(self.config))

    def _refuse_unimplemented(self) -> None:
        common = {
            "prediction_type": ("epsilon", "v_prediction"),
            "timestep_spacing": ("leading", "linspace", "trailing"),
            "trained_betas": (),
        }
        for option, values in {**common, **self.implemented}.items():
            value = self.config.get(option)
            if value is not None and value not in values:
                known = ", ".join(str(v) for v in values) or "leaving it out"
                raise ConfigError(
                    f"the {self.name} sampler does not implement {option}={value!r} of the scheduler's configuration",
                    hint=f"implemented: {known}",
                )

    def _spaced(self, count: int) -> Array:
        """``count`` timesteps of the training schedule, descending, float64 (Lin et al. 2023, table 2)."""
        if self.spacing == "linspace":
            return np.linspace(0, self.train_steps - 1, count)[::-1]
        if self.spacing == "leading":
            ratio = self.train_steps // count
            return np.arange(count)[::-1] * float(ratio) + float(self.config.get("steps_offset", 0))
        # diffusers takes one step too many, at timestep -1, where 1000 / steps rounds badly (61, 103, 121, …)
        return np.arange(self.train_steps, 0, -self.train_steps / count)[:count].round() - 1

    def scale_model_input(self, sample: Array, index: int) -> Array:
        """What the UNet sees of ``sample`` [B, C, h, w] at step ``index``."""
        return sample

    @abstractmethod
    def step(self, output: Array, index: int, sample: Array) -> Array:
        """The next sample.

        Args:
            output: [B, C, h, w] float32, the (guided) prediction of the UNet.
            index: which step this is, 0 … steps - 1, in order.
            sample: [B, C, h, w] float32, before ``scale_model_input``.
        """


class DDIM(Scheduler):
    """Deterministic DDIM (eta = 0): Song et al. 2021, equation 12."""

    name = "ddim"
    diffusers_class = "DDIMScheduler"
    implemented: ClassVar = {"thresholding": (False,)}
    default_spacing = "leading"

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self.timesteps = self._spaced(steps).round().astype(np.int64)
        largest = int(self.timesteps[0])
        if largest >= self.train_steps:
            raise ConfigError(
                f"{steps} steps with steps_offset={self.config['steps_offset']} start at timestep {largest} of "
                f"{self.train_steps}",
                hint="take fewer steps",
            )
        if self.prediction_type == "epsilon" and self.alphas_cumprod[largest] == 0:
            raise ConfigError(
                "ddim cannot start from pure noise (rescale_betas_zero_snr) with an epsilon-predicting model",
                hint="choose the euler or dpm++ sampler, or leading timesteps",
            )
        final = 1.0 if self.config.get("set_alpha_to_one", True) else self.alphas_cumprod[0]
        # The neighbour is counted on the training schedule and may differ from the next timestep, as in diffusers.
        previous = self.timesteps - self.train_steps // steps
        self._alpha = self.alphas_cumprod[self.timesteps].astype(np.float64)
        self._alpha_previous = np.where(previous >= 0, self.alphas_cumprod[previous], final).astype(np.float64)
        self._clip = float(self.config.get("clip_sample_range", 1.0)) if self.config.get("clip_sample", True) else None

    def step(self, output: Array, index: int, sample: Array) -> Array:
        alpha, sigma = math.sqrt(self._alpha[index]), math.sqrt(1 - self._alpha[index])
        if self.prediction_type == "epsilon":
            original, noise = (sample - sigma * output) / alpha, output
        else:
            original, noise = alpha * sample - sigma * output, alpha * output + sigma * sample
        if self._clip is not None:
            original = np.clip(original, -self._clip, self._clip)
        previous = float(self._alpha_previous[index])
        return math.sqrt(previous) * original + math.sqrt(1 - previous) * noise


class _SigmaScheduler(Scheduler):
    """What Euler and DPM-Solver++ share: sigma = sqrt((1 - alpha_bar) / alpha_bar), read between timesteps too."""

    default_spacing = "linspace"

    def _sigmas(self, timesteps: Array) -> Array:
        """[steps + 1] float64 values with float32 rounding; the last one ends the trajectory."""
        alphas = self.alphas_cumprod.copy()
        if self.config.get("rescale_betas_zero_snr"):
            alphas[-1] = ALMOST_ZERO
        all_sigmas = np.sqrt((np.float32(1) - alphas) / alphas)
        last = all_sigmas[0] if self.config.get("final_sigmas_type", "zero") == "sigma_min" else 0.0
        sigmas = np.interp(timesteps, np.arange(self.train_steps), all_sigmas)
        return np.append(sigmas, last).astype(np.float32).astype(np.float64)


class Euler(_SigmaScheduler):
    """Euler's method on the probability-flow ODE, without churn: Karras et al. 2022, algorithm 2."""

    name = "euler"
    diffusers_class = "EulerDiscreteScheduler"
    implemented: ClassVar = {
        "interpolation_type": ("linear",),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "sigma_min": (),
        "sigma_max": (),
        "timestep_type": ("discrete",),
        "final_sigmas_type": ("zero", "sigma_min"),
    }

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self.timesteps = self._spaced(steps).astype(np.float32)
        self.sigmas = self._sigmas(self.timesteps)
        largest = float(self.sigmas.max())
        self.init_noise_sigma = largest if self.spacing != "leading" else math.sqrt(largest**2 + 1)

    def scale_model_input(self, sample: Array, index: int) -> Array:
        return sample / math.sqrt(float(self.sigmas[index]) ** 2 + 1)

    def step(self, output: Array, index: int, sample: Array) -> Array:
        sigma, following = float(self.sigmas[index]), float(self.sigmas[index + 1])
        change = following - sigma
        if self.prediction_type == "epsilon":
            return sample + change * output
        # dx/dsigma = (x - x0) / sigma with x0 = x / (sigma² + 1) - sigma / sqrt(sigma² + 1) * v, collected by x and v:
        # near sigma = 4096 (zero terminal SNR) the difference x - x0 would lose what float32 has.
        variance = sigma**2 + 1
        return (1 + change * sigma / variance) * sample + (change / math.sqrt(variance)) * output


class DPMSolverPlusPlus(_SigmaScheduler):
    """DPM-Solver++(2M), midpoint: Lu et al. 2022 (arXiv:2211.01095), algorithm 2."""

    name = "dpm++"
    diffusers_class = "DPMSolverMultistepScheduler"
    implemented: ClassVar = {
        "solver_order": (2,),
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint", "bh1", "bh2"),  # diffusers, too, reads UniPC's values as midpoint
        "thresholding": (False,),
        "use_karras_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "use_lu_lambdas": (False,),
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
        "final_sigmas_type": ("zero", "sigma_min"),
        "lambda_min_clipped": (-math.inf, "-inf"),  # the second as a manifest writes it
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    }

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        # linspace and leading count one timestep more and leave it out, trailing does not
        spaced = self._spaced(steps) if self.spacing == "trailing" else self._spaced(steps + 1)[:-1]
        self.timesteps = spaced.round().astype(np.int64)
        self.sigmas = self._sigmas(self.timesteps)
        few = bool(self.config.get("lower_order_final", True)) and steps < 15  # diffusers' threshold
        zero = self.config.get("final_sigmas_type", "zero") == "zero"
        self._final_first_order = few or zero or bool(self.config.get("euler_at_final", False))
        self._previous: Array | None = None

    def step(self, output: Array, index: int, sample: Array) -> Array:
        sigma, following = float(self.sigmas[index]), float(self.sigmas[index + 1])
        alpha = 1 / math.sqrt(sigma**2 + 1)
        if self.prediction_type == "epsilon":
            original = sample / alpha - sigma * output
        else:
            original = alpha * sample - (sigma * alpha) * output
        previous, self._previous = self._previous, original

        # exp(-h) of the paper is the ratio of the sigmas, as lambda = -log(sigma)
        next_alpha = 1 / math.sqrt(following**2 + 1)
        weight = next_alpha * (1 - following / sigma)
        stepped = (following * next_alpha / (sigma * alpha)) * sample + weight * original
        last = index == self.steps - 1
        if index == 0 or (last and self._final_first_order):
            return stepped
        assert previous is not None
        before = float(self.sigmas[index - 1])
        ratio = math.log(sigma / following) / math.log(before / sigma)  # h / h_0
        stepped += (0.5 * weight * ratio) * (original - previous)
        return stepped


_SAMPLERS: tuple[type[Scheduler], ...] = (DDIM, Euler, DPMSolverPlusPlus)

#: The names a sampler is asked for by.
NAMES: tuple[str, ...] = tuple(sampler.name for sampler in _SAMPLERS)


def default_name(config: Mapping[str, Any]) -> str:
    """Name of the sampler that wrote ``config``; ``ConfigError`` if it is none of ``NAMES``."""
    written_by = config.get("_class_name")
    for sampler in _SAMPLERS:
        if sampler.diffusers_class == written_by:
            return sampler.name
    raise ConfigError(
        f"the model's own sampler {written_by!r} is not implemented", hint=f"choose one of {', '.join(NAMES)}"
    )


def from_config(config: Mapping[str, Any], steps: int, name: str | None = None) -> Scheduler:
    """A scheduler for one trajectory.

    Args:
        config: contents of diffusers' ``scheduler_config.json``.
        steps: number of UNet evaluations.
        name: one of ``NAMES``; ``None`` for the sampler the configuration was written by.

    Raises:
        ConfigError: unknown sampler, unimplemented option, or an impossible number of steps.
    """
    wanted = name or default_name(config)
    for sampler in _SAMPLERS:
        if sampler.name == wanted:
            return sampler(config, steps)
    raise ConfigError(f"unknown sampler {wanted!r}", hint=f"choose one of {', '.join(NAMES)}")
