"""One trajectory of our sampler and of its diffusers namesake, with the same model and the same noise."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from mtu_compile.runtime.schedulers import SAMPLERS, from_config

CLASSES = {name: getattr(diffusers, sampler.diffusers_class) for name, sampler in SAMPLERS.items()}

#: The training schedule of Stable Diffusion.
SD = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.0",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SHAPE = (1, 4, 4, 4)
NOISE = np.random.Generator(np.random.PCG64(0)).standard_normal(SHAPE, dtype=np.float32)


def fresh_noise(index: int) -> np.ndarray:
    """The noise drawn at one call."""
    return np.random.Generator(np.random.PCG64(1 + index)).standard_normal(SHAPE, dtype=np.float32)


def fake_model(sample: np.ndarray, timestep: float) -> np.ndarray:
    """Smooth, nonlinear, mixes channels, and depends on the timestep; computed once for both sides."""
    mixed = 0.9 * sample + 0.3 * np.roll(sample, 1, axis=1)
    return (np.tanh(mixed) + 0.2 * np.sin(3 * sample + timestep / 300)).astype(np.float32)


class _Drawn(TorchFunctionMode):
    """Gives diffusers the noise of ``fresh_noise``."""

    index = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.from_numpy(fresh_noise(self.index)) if func is torch.randn else func(*args, **(kwargs or {}))


def ours(config: dict[str, Any], steps: int, name: str | None) -> list[np.ndarray]:
    scheduler = from_config(config, steps, name)
    sample = NOISE * np.float32(scheduler.init_noise_sigma)
    trajectory = [sample]
    for index, timestep in enumerate(scheduler.timesteps):
        output = fake_model(scheduler.scale_model_input(sample, index), float(timestep))
        sample = scheduler.step(output, index, sample, fresh_noise(index) if scheduler.draws_noise else None)
        assert sample.dtype == np.float32
        trajectory.append(sample)
    return trajectory


def theirs(config: dict[str, Any], steps: int, name: str) -> list[np.ndarray]:
    scheduler = CLASSES[name].from_config(config)
    scheduler.set_timesteps(steps)
    sample = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
    trajectory = [sample.numpy()]
    for index, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(sample, timestep).numpy()
        output = torch.from_numpy(fake_model(seen, float(timestep)))
        with _Drawn() as drawn:
            drawn.index = index
            sample = scheduler.step(output, timestep, sample).prev_sample
        trajectory.append(sample.numpy())
    return trajectory


def deviation(
    config: dict[str, Any], steps: int, name: str, told: dict[str, Any] | None = None, relative_to: str = "step"
) -> float:
    """Largest difference along the trajectory, relative to the largest value at that step, or of the trajectory.

    ``told`` is the configuration for diffusers where it has another form there.
    """
    expected, got = theirs(told or config, steps, name), ours(config, steps, name)
    assert len(expected) == len(got)
    scales = [float(np.abs(sample).max()) for sample in expected]
    assert all(np.isfinite(sample).all() for sample in (*expected, *got))
    if relative_to == "trajectory":
        scales = [max(scales)] * len(scales)
    return max(float(np.abs(a - b).max()) / scale for a, b, scale in zip(expected, got, scales, strict=True))


def takes(name: str) -> set[str]:
    """The options of a sampler's diffusers namesake."""
    return set(inspect.signature(CLASSES[name].__init__).parameters) - {"self"}
