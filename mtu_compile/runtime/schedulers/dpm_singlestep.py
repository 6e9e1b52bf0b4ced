"""DPM-Solver++ whose steps stand on their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from mtu_compile.runtime.schedulers import options
from mtu_compile.runtime.schedulers.base import Array, drawn
from mtu_compile.runtime.schedulers.dpm_multistep import DPM_OPTIONS
from mtu_compile.runtime.schedulers.solvers import Solver, dpm_step, last_timestep


class DPMSolverSinglestep(Solver):
    """DPM-Solver++(2S) and its relatives: Lu et al. 2022 (arXiv:2211.01095), algorithm 1.

    A step of order n is made of n calls at neighbouring timesteps, so ``steps`` counts UNet calls here, too.
    """

    name = "dpm++-single"
    diffusers_class = "DPMSolverSinglestepScheduler"
    declared: ClassVar = {**DPM_OPTIONS, "lower_order_final": options.flag(False)}

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        super().__init__(config, steps)
        self.draws_noise = self.options["algorithm_type"] == "sde-dpmsolver++"
        self._orders = self._plan()
        self._history: list[Array] = []
        self._start: Array | None = None

    def _plan(self) -> list[int]:
        """Order of the update at each call; an update of order n starts n calls back."""
        steps, order = self.steps, int(self.options["solver_order"])
        zero = self.options["final_sigmas_type"] == "zero"
        if not self.options["lower_order_final"] and steps % order == 0 and not zero:
            return list(range(1, order + 1)) * (steps // order)
        # diffusers turns lower_order_final on where the steps cannot be divided, or the last sigma is zero
        if order == 3:
            tail = {0: [1, 2, 1], 1: [1], 2: [1, 2]}[steps % 3]
        elif order == 2:
            tail = [1, 1] if steps % 2 == 0 else [1]
        else:
            tail = [1]
        plan = [*list(range(1, order + 1)) * ((steps - len(tail)) // order), *tail]
        return [*plan[:-1], 1] if zero else plan

    def _last_timestep(self, training: Array) -> int:
        return last_timestep(training, self.options["lambda_min_clipped"])

    def _whole_timesteps(self, last: int) -> Array:
        return np.linspace(0, last - 1, self.steps + 1)[:0:-1].round().astype(np.int64)

    def step(self, output: Array, index: int, sample: Array, noise: Array | None = None) -> Array:
        self._history = [self._denoised(output, index, sample), *self._history[:2]]
        order = self._orders[index]
        if order == 1:
            self._start = sample
        assert self._start is not None
        begin, alpha = index - order + 1, self._alpha(index + 1)
        h = self._lambda(index + 1) - self._lambda(begin)
        return dpm_step(
            self.options["solver_type"],
            order,
            transition=self._transition(begin, index + 1),
            alpha=alpha,
            noise_level=float(self.sigmas[index + 1]) * alpha,
            h=h,
            sample=self._start,
            differences=self._differences(begin, index, order, h),
            noise=drawn(noise) if self.draws_noise else None,
        )

    def _differences(self, begin: int, index: int, order: int, h: float) -> tuple[Array, ...]:
        """The clean latent where the update starts, and its divided differences, scaled to the step ``h``."""
        start = self._history[order - 1]
        if order == 1 or h == 0:
            return (start,)
        far = (self._lambda(index) - self._lambda(begin)) / h
        whole = (self._history[0] - start) / far
        if order == 2:
            return start, whole
        near = (self._lambda(begin + 1) - self._lambda(begin)) / h
        part = (self._history[1] - start) / near
        if self.options["solver_type"] == "midpoint":
            return start, whole
        return start, (far * part - near * whole) / (far - near), 2 * (whole - part) / (far - near)
