"""Capture what a task's UNet really sees: its inputs along the denoising of real prompts, pictures and masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from calibration.observe import Array, observe
from calibration.samples import Sample
from calibration.sets import SEED_OFFSET, CalibrationSet
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.fit import Fit
from mtu_compile.core.tasks import Task
from mtu_compile.core.version import __version__

#: Which calls of a trajectory are kept: one of each stratum of the schedule, another one in each trajectory; the same
#: evenly spaced ones in each; or random ones. All keep the first, in which the latent is the noise of its seed.
Sampling = Literal["stratified", "uniform", "random"]

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
    fit: Fit = "crop",
    calls: int | None = CALLS,
    sampling: Sampling = "stratified",
    progress: Callable[[int], None] | None = None,
) -> CalibrationSet:
    """Run ``pipeline`` on every sample, guidance on, and keep UNet inputs from all over the schedule.

    The same pipeline, samples and settings give the same set, to the hash.

    Args:
        pipeline: an ``MTUPipeline`` in float.
        task: the task to capture.
        samples: what to run it on, one trajectory each.
        model_sha256: hash of the pipeline's folder.
        steps: denoising steps.
        size: height and width in pixels, the model's own by default.
        seed: trajectory ``i`` starts from the noise of ``seed + SEED_OFFSET + i``.
        fit: what becomes of pictures of other proportions.
        calls: UNet calls kept of each trajectory; ``None`` for all.
        sampling: which ones.
        progress: called with 1 after each trajectory.

    Raises:
        CalibrationError: there are no samples.
    """
    if not samples:
        raise CalibrationError(f"there are no samples to calibrate task {task.name!r} with")
    inputs: list[dict[str, Array]] = []
    latents: list[Array] = []
    trajectories: list[int] = []
    for i, sample in enumerate(samples):
        noise = seed + SEED_OFFSET + i
        seen = observe(pipeline, task, sample, size=size, steps=steps, seed=noise, fit=fit, output_type="latent")
        picked = pick(sampling, len(seen.inputs), calls, i, noise)
        inputs += [seen.inputs[index] for index in picked]
        latents.append(seen.made.latents.float().cpu().numpy())
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
        size=pipeline.resolve_size(*(size or (None, None))),
        strategy=sampling,
        producer={"mtu-compile": __version__, "torch": version("torch"), "diffusers": version("diffusers")},
        latents=np.stack(latents),
    )


def pick(sampling: Sampling, total: int, calls: int | None, turn: int, seed: int) -> list[int]:
    """Which of the calls ``0 … total - 1`` of trajectory ``turn`` are kept: at most ``calls``, in order, always 0."""
    if calls is None or calls >= total:
        return list(range(total))
    if sampling == "uniform":
        return [int(index) for index in np.linspace(0, total - 1, calls).round()]
    if sampling == "random":
        rest = np.random.default_rng(seed).choice(np.arange(1, total), calls - 1, replace=False)
        return [0, *sorted(int(index) for index in rest)]
    return stratified(total, calls, turn)


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
