"""DPM-Solver++ that remembers earlier predictions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array, drawn
from mtu_compile.runtime.schedulers.solvers import FEW_STEPS, Solver, dpm_step, last_timestep

#: What both DPM-Solvers have.
DPM_OPTIONS: options.Options = {
    **options.training(),
    **options.NO_THRESHOLDING,
    **options.NO_FLOW,
    **options.SPREADS,
    "prediction_type": options.one_of("epsilon", "v_prediction", "sample"),
    "solver_order": options.count(2, 1, 3),
    # the solvers without "++" are deprecated in diffusers, and refuse its own default of the final sigma
    "algorithm_type": options.one_of("dpmsolver++", "sde-dpmsolver++", reads={"deis": "dpmsolver++"}),
    "solver_type": options.one_of("midpoint", "heun", reads=dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")),
    "lower_order_final": options.flag(True),
    "final_sigmas_type": options.one_of("zero", "sigma_min"),
    "lambda_min_clipped": options.number(-math.inf),
    # only the learned ones change anything
    "variance_type": options.neutral(None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}


class DPMSolverPlusPlus(Solver):
    """DPM-Solver++(2M) and its relatives: order 1 to 3, midpoint or Heun, ODE or SDE.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 2.
    """

    name = "dpm++"
    diffusers_class = "DPMSolverMultistepScheduler"
    declared: ClassVar = {
        **DPM_OPTIONS,
        **options.spacing("linspace"),
        "euler_at_final": options.flag(False),
        "use_lu_lambdas": options.flag(False),
        "rescale_betas_zero_snr": options.flag(False),
    }

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self.draws_noise = self.options["algorithm_type"] == "sde-dpmsolver++"
        few = self.options["lower_order_final"] and len(self.timesteps) < FEW_STEPS
        zero = self.options["final_sigmas_type"] == "zero"
        last = 1 if few or zero or self.options["euler_at_final"] else 3
        #: Highest order of the last but one and of the last step.
        self._final_orders = (2 if few else 3, last)
        self._history: list[Array] = []

    def _last_timestep(self, training: Array) -> int:
        return last_timestep(training, self.options["lambda_min_clipped"])

    def _spread_sigmas(self, largest: float, smallest: float, count: int) -> Array:
        if self._spread == "use_lu_lambdas":
            self._bounds = dict.fromkeys(self._bounds)  # asks for none
        return super()._spread_sigmas(largest, smallest, count)

    def _told(self, timesteps: Array) -> Array:
        rounded = self._spread != "use_exponential_sigmas" and self.options["beta_schedule"] != "squaredcos_cap_v2"
        return timesteps.round() if rounded else timesteps

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        self._history = [self._denoised(output, index, sample), *self._history[:2]]
        remaining = len(self.timesteps) - index
        allowed = self._final_orders[-remaining] if remaining <= 2 else 3
        order = min(self.options["solver_order"], len(self._history), allowed)
        alpha = self._alpha(index + 1)
        h = self._lambda(index + 1) - self._lambda(index)
        return dpm_step(
            self.options["solver_type"],
            order,
            transition=self._transition(index, index + 1),
            alpha=alpha,
            noise_level=float(self.sigmas[index + 1]) * alpha,
            h=h,
            sample=sample,
            differences=self._differences(index, order, h),
            noise=drawn(noise) if self.draws_noise else None,
        )

    def _differences(self, index: int, order: int, h: float) -> tuple[Array, ...]:
        """The clean latent and its divided differences, scaled to the step ``h``."""
        newest = self._history[0]
        if order == 1 or h == 0:
            return (newest,)
        before = self._lambda(index) - self._lambda(index - 1)
        first = (h / before) * (newest - self._history[1])
        if order == 2:
            return newest, first
        earlier = self._lambda(index - 1) - self._lambda(index - 2)
        bend = first - (h / earlier) * (self._history[1] - self._history[2])
        span = (before + earlier) / h
        return newest, first + (before / (before + earlier)) * bend, bend / span
