"""What samplers over sigma = sqrt((1 - alpha_bar) / alpha_bar) share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtu_compile.core.errors import ConfigError
from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array, Scheduler
from mtu_compile.runtime.schedulers.noise_schedule import ALMOST_ZERO

#: Exponent of Karras' spacing (Karras et al. 2022, section 5).
RHO = 7.0

#: Evenly spaced in lambda (Lu et al. 2022, section 3.2), which only DPM-Solver++ has an option for.
LU = "use_lu_lambdas"

#: ``sigma_min`` and ``sigma_max``, between which sigmas are spread.
BOUND = options.number(None, 1e-6, 1e6)


def interpolate_timesteps(sigmas: Array, log_training: Array) -> Array:
    """The timesteps, between whole ones, at which the training schedule has ``sigmas`` [n]; [n] float64.

    Args:
        sigmas: [n].
        log_training: [T] float32, logarithms of the training schedule's sigmas, ascending.
    """
    wanted = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(log_training, wanted, side="right") - 1, 0, len(log_training) - 2)
    below, above = log_training[low], log_training[low + 1]
    share = np.clip((below - wanted) / (below - above), 0, 1)
    return np.asarray((1 - share) * low + share * (low + 1))


class SigmaScheduler(Scheduler):
    """A sampler whose schedule may be read between timesteps.

    Attributes:
        sigmas: of each step, then the one the trajectory ends with; float64 values with float32's rounding.
    """

    sigmas: Array

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        # diffusers finds these two in a configuration even where the class does not have them.
        self._bounds = options.read(self.name, {"sigma_min": BOUND, "sigma_max": BOUND}, config)
        spreads = [name for name in (*options.SPREADS, LU) if self.options.get(name)]
        if len(spreads) > 1:
            raise ConfigError(f"the scheduler's configuration sets both {spreads[0]} and {spreads[1]}")
        self._spread = spreads[0] if spreads else None

    def _training_sigmas(self) -> Array:
        """[T] float32, ascending."""
        alphas = self.alphas_cumprod.copy()
        if self.options.get("rescale_betas_zero_snr"):
            alphas[-1] = ALMOST_ZERO
        return np.asarray(np.sqrt((np.float32(1) - alphas) / alphas))

    def _spread_sigmas(self, largest: float, smallest: float, count: int) -> Array:
        """``count`` sigmas between two, by Karras' rule or evenly in the logarithm."""
        bounds = self._bounds
        largest = largest if bounds["sigma_max"] is None else bounds["sigma_max"]
        smallest = smallest if bounds["sigma_min"] is None else bounds["sigma_min"]
        if self._spread == "use_karras_sigmas":
            high, low = largest ** (1 / RHO), smallest ** (1 / RHO)
            return np.asarray((high + np.linspace(0, 1, count) * (low - high)) ** RHO)
        return np.exp(np.linspace(math.log(largest), math.log(smallest), count))

    def _set_sigmas(self, sigmas: Array, last: float) -> None:
        """``ConfigError`` unless every step but the last really goes down."""
        self.sigmas = np.append(sigmas, last).astype(np.float32).astype(np.float64)
        if (np.diff(self.sigmas[:-1]) >= 0).any():
            raise self._refuse_steps("it would come to a timestep twice")


class VarianceExploding(SigmaScheduler):
    """A sampler for ``sample`` = clean + sigma · noise (Karras et al. 2022); the UNet sees it at unit variance."""

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        timesteps = self._spaced(steps).astype(np.float32)
        self._use(timesteps)
        training = self._training_sigmas()
        sigmas = np.interp(timesteps, np.arange(self.train_steps), training)
        if self._spread:
            sigmas = self._spread_sigmas(float(sigmas[0]), float(sigmas[-1]), steps)
            self.timesteps = self._between(interpolate_timesteps(sigmas, np.log(training))).astype(np.float32)
        ends_early = self.options.get("final_sigmas_type") == "sigma_min"
        self._set_sigmas(sigmas, float(training[0]) if ends_early else 0.0)
        largest = float(self.sigmas.max())
        leading = self.options["timestep_spacing"] == "leading"
        self.init_noise_sigma = math.sqrt(largest**2 + 1) if leading else largest

    def _between(self, timesteps: Array) -> Array:
        """What the UNet is told where sigmas lie between timesteps."""
        return timesteps

    def _input_sigma(self, index: int) -> float:
        """sigma of the sample that call ``index`` sees."""
        return float(self.sigmas[index])

    def scale_model_input(self, sample: Array, index: int) -> Array:
        return sample / math.sqrt(self._input_sigma(index) ** 2 + 1)

    def _advance(self, output: Array, sample: Array, sigma: float, change: float) -> Array:
        """``sample`` at ``sigma`` after Euler's step of ``change``."""
        if self.prediction_type == "epsilon":
            return sample + change * output
        if self.prediction_type == "v_prediction":
            # dx/dsigma = (x - x0) / sigma with x0 = x / (sigma² + 1) - sigma / sqrt(sigma² + 1) * v, collected by x and
            # v: near sigma = 4096 (zero terminal SNR) the difference x - x0 would lose what float32 has.
            variance = sigma**2 + 1
            return (1 + change * sigma / variance) * sample + (change / math.sqrt(variance)) * output
        return (1 + change / sigma) * sample - (change / sigma) * output

    def _derivative(self, output: Array, sample: Array, sigma: float) -> Array:
        """dx/dsigma at ``sigma``."""
        if self.prediction_type == "epsilon":
            return output
        if self.prediction_type == "v_prediction":
            variance = sigma**2 + 1
            return (sigma / variance) * sample + (1 / math.sqrt(variance)) * output
        return (sample - output) / sigma
