"""Capture what a task's UNet really sees: its inputs along the denoising of real prompts, pictures and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

from calibration.observe import Array, observe
from calibration.samples import Sample
from calibration.sets import CalibrationSet
from mtu_compile import __version__
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.tasks import Task

#: Distance between the seeds of calibration and those of checks: no engine is checked on noise it was calibrated with.
SEED_OFFSET = 1_000_000

#: UNet calls kept of each trajectory. Ten strata of the schedule; over several trajectories every step is met.
CALLS = 10


def capture(
    pipeline: Any,
    task: Task,
    samples: Sequence[Sample],
    *,
    model_sha256: str,
    steps: int,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    calls: int | None = CALLS,
    progress: Callable[[int], None] | None = None,
) -> CalibrationSet:
    """Run ``pipeline`` on every sample, guidance on, and keep UNet inputs spread evenly over the schedule.

    The same pipeline, samples and settings give the same set, to the hash.

    Args:
        pipeline: an ``MTUPipeline`` in float.
        task: the task to capture.
        samples: what to run it on, one trajectory each.
        model_sha256: hash of the pipeline's folder.
        steps: denoising steps.
        size: height and width in pixels, the model's own by default.
        seed: trajectory ``i`` starts from the noise of ``seed + SEED_OFFSET + i``.
        calls: UNet calls kept of each trajectory; ``None`` for all.
        progress: called with 1 after each trajectory.

    Raises:
        CalibrationError: there are no samples.
    """
    if not samples:
        raise CalibrationError(f"there are no samples to calibrate task {task.name!r} with")
    inputs: list[dict[str, Array]] = []
    trajectories: list[int] = []
    for i, sample in enumerate(samples):
        options = {"seed": seed + SEED_OFFSET + i, "output_type": "latent"}
        seen = observe(pipeline, task, sample, size=size, steps=steps, **options).inputs
        picked = stratified(len(seen), calls, i)
        inputs += [seen[index] for index in picked]
        trajectories += [i] * len(picked)
        if progress is not None:
            progress(1)
    return CalibrationSet(
        task=task.name,
        model_sha256=model_sha256,
        inputs=tuple(inputs),
        timesteps=tuple(float(call["timestep"][0]) for call in inputs),
        trajectories=tuple(trajectories),
        prompts=tuple(sample.prompt for sample in samples),
        seeds=tuple(seed + SEED_OFFSET + i for i in range(len(samples))),
        scheduler=_scheduler(pipeline.scheduler),
        steps=steps,
        latent_channels=int(pipeline.unet.latent_channels),
        producer={"mtu-compile": __version__, "torch": version("torch"), "diffusers": version("diffusers")},
    )


def stratified(total: int, calls: int | None, turn: int) -> list[int]:
    """``calls`` of the indices ``0 … total - 1``, one from each of as many equal strata.

    Which one of its stratum changes with ``turn``, so that after as many turns as a stratum is long all were met; only
    the first is always 0, where the latent is still the noise of its seed.
    """
    if calls is None or calls >= total:
        return list(range(total))
    edges = [stratum * total // calls for stratum in range(calls + 1)]
    return [low + turn % (high - low) if low else 0 for low, high in pairwise(edges)]


def _scheduler(scheduler: Any) -> dict[str, Any]:
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    plain = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in config.items()}
    return {"_class_name": type(scheduler).__name__, **plain}
