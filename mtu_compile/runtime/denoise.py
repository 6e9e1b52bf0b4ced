"""From noise to the final latent: the sampler, the UNet and guidance, step by step, for one picture or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtu_compile.bundle import Manifest, StepCache, TaskEntry
from mtu_compile.core.guidance import ROWS, combine
from mtu_compile.core.tasks import Task
from mtu_compile.runtime import guidance, schedulers
from mtu_compile.runtime.engine import Engine
from mtu_compile.runtime.finite import advice, require_finite
from mtu_compile.runtime.preview import clean_estimate
from mtu_compile.runtime.request import called
from mtu_compile.runtime.step_cache import Remembered, predict
from mtu_compile.runtime.task_engine import TASK_INPUT

Array = NDArray[Any]

#: Called after each step with the number of steps done and their total.
Progress = Callable[[int, int], None]
#: Called after each step of each picture with its place among the others, the number of steps done, and a function that
#: gives the clean latent [1, C, h, w] as it is estimated now.
Watch = Callable[[int, int, Callable[[], Array]], None]


@dataclass(frozen=True)
class Start:
    """What a picture starts from.

    Attributes:
        entry: its task as the bundle has it.
        task: the task as it is run: with no more guidance than the scales leave.
        sampler: for the steps of this picture.
        noise: [1, C, h, w], of unit variance.
        draw: fresh noise of a call, for samplers that draw it.
        condition: [1, c, h, w], or ``None`` for a task without.
        embeddings: [b, L, D], one for each sample of the guidance.
        place: which of several requests it is, for messages; empty for the only one.
        added: what its UNet takes beside that, by input name, a row for each sample of the guidance.
        cache: which of its UNet calls are whole; all without.
    """

    entry: TaskEntry
    task: Task
    sampler: schedulers.Scheduler
    noise: Array
    draw: Callable[[int, Sequence[int]], Array] | None
    condition: Array | None
    embeddings: Array
    place: str = ""
    added: Mapping[str, Array] = field(default_factory=dict)
    cache: StepCache | None = None

    @property
    def samples(self) -> int:
        """UNet samples a step."""
        return len(ROWS[self.task.guidance])


def denoise(
    unet: Engine,
    manifest: Manifest,
    starts: Sequence[Start],
    progress: Progress | None,
    watch: Watch | None = None,
    shallow: Engine | None = None,
) -> list[Array]:
    """Of each picture, noise [1, C, h, w] → final latent [1, C, h, w].

    All go through one UNet call a step, which a UNet without an input ``task`` can do for pictures of its own task;
    where some of them need only the shallow UNet at that step, through one call of each.

    Args:
        unet: for the pictures' tasks.
        manifest: the bundle's.
        starts: pictures whose samplers stop at the same timesteps.
        progress: told of every step.
        watch: told of every step of every picture.
        shallow: the shallow UNet, where a picture has a cache.

    Raises:
        NotFiniteError: the UNet's output has NaN or Inf values.
    """
    channels = manifest.latent_channels
    ends = np.cumsum([start.samples for start in starts])
    parts = [slice(end - start.samples, end) for start, end in zip(starts, ends, strict=True)]
    sample = _conditions(unet, starts, parts, channels)
    timestep = np.zeros(1, np.float32)
    embeddings = np.concatenate([start.embeddings for start in starts])
    inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": embeddings}
    inputs |= {name: np.concatenate([start.added[name] for start in starts]) for name in starts[0].added}
    if (taken := unet.inputs.get(guidance.SCALE_INPUT)) is not None:
        width = int(taken.shape[1] or 0)
        scales = [guidance.embed_scale(start.task.guidance_scale, width, start.samples) for start in starts]
        inputs[guidance.SCALE_INPUT] = np.concatenate(scales)
    if (taken := unet.inputs.get(TASK_INPUT)) is not None:
        ids = [start.entry.task_id for start in starts for _ in range(start.samples)]
        inputs[TASK_INPUT] = np.array(ids, taken.dtype)

    latents = [start.noise * np.float32(start.sampler.init_noise_sigma) for start in starts]
    timesteps = starts[0].sampler.timesteps
    calls, remembered = len(timesteps), [Remembered(timesteps, start.cache) for start in starts]
    for index in range(calls):
        for start, part, latent in zip(starts, parts, latents, strict=True):
            sample[part, :channels] = start.sampler.scale_model_input(latent, index)
        timestep[0] = timesteps[index]
        output = predict(unet, shallow, inputs, parts, remembered, index)
        for position, (start, part) in enumerate(zip(starts, parts, strict=True)):
            guided, before = _guided(start, manifest, output[part], index), latents[position]
            latents[position] = _step(start, guided, index, before)
            if watch is not None:
                watch(position, index + 1, partial(clean_estimate, start.sampler, guided, index, before))
        if progress is not None:
            progress(index + 1, calls)
    return latents


def _conditions(unet: Engine, starts: Sequence[Start], parts: Sequence[slice], channels: int) -> Array:
    """The UNet's ``sample``, as wide as it takes it, with the conditions in it.

    It is one buffer for all steps: the conditions stay, and the noisy latents are written over.
    """
    own = [start.entry.task.condition_channels(channels) for start in starts]
    width = unet.inputs["sample"].shape[1] or channels + max(own)
    sample = np.zeros((parts[-1].stop, width, *starts[0].noise.shape[2:]), np.float32)
    for start, part, count in zip(starts, parts, own, strict=True):
        for index, row in enumerate(ROWS[start.task.guidance], part.start):
            if start.condition is not None and row.condition:
                sample[index, channels : channels + count] = start.condition[0]
    return sample


def _step(start: Start, guided: Array, index: int, latents: Array) -> Array:
    """The latent after UNet call ``index``, whose guided answer is ``guided`` [1, C, h, w]."""
    return start.sampler.step(guided, index, latents, None if start.draw is None else start.draw(index, latents.shape))


def _guided(start: Start, manifest: Manifest, output: Array, index: int) -> Array:
    """What guidance makes [1, C, h, w] of the UNet's answers ``output`` [b, C, h, w] to call ``index``."""
    sampler, task = start.sampler, start.task
    with called(start.place):
        require_finite(
            output,
            "unet",
            hint=advice(manifest, start.entry.engine),
            task=task.name,
            step=index + 1,
            steps=len(sampler.timesteps),
            timestep=float(sampler.timesteps[index]),
        )
    answers = np.split(output, len(output))
    return combine(task.guidance, answers, task.guidance_scale, task.image_guidance_scale)
