"""From noise to the final latent: the sampler, the UNet and guidance, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtu_compile.bundle import Manifest, TaskEntry
from mtu_compile.core.guidance import ROWS, combine
from mtu_compile.core.tasks import Task
from mtu_compile.runtime import guidance, schedulers
from mtu_compile.runtime.engine import Engine
from mtu_compile.runtime.finite import advice, require_finite

Array = NDArray[Any]

#: Called after each step with the number of steps done and their total.
Progress = Callable[[int, int], None]


def denoise(
    unet: Engine,
    manifest: Manifest,
    entry: TaskEntry,
    task: Task,
    sampler: schedulers.Scheduler,
    noise: Array,
    draw: Callable[[int, Sequence[int]], Array] | None,
    condition: Array | None,
    embeddings: Array,
    progress: Progress | None,
) -> Array:
    """Noise [1, C, h, w] → final latent [1, C, h, w].

    Args:
        unet: the task's.
        manifest: the bundle's.
        entry: the task as the bundle has it.
        task: the task as it is run: with no more guidance than the scales leave.
        sampler: for the steps of this run.
        noise: of unit variance.
        draw: fresh noise of a call, for samplers that draw it.
        condition: [1, c, h, w], or ``None`` for a task without.
        embeddings: [b, L, D], one for each sample of the guidance.
        progress: told of every step.

    Raises:
        NotFiniteError: the UNet's output has NaN or Inf values.
    """
    channels = manifest.latent_channels
    batch, rows = entry.task.unet_batch, ROWS[task.guidance]
    padded = guidance.fill(rows, batch)
    embeddings = guidance.fill(embeddings, batch)
    # One buffer for all steps: the condition stays, and the noisy latent is written over.
    sample = np.zeros((len(padded), channels + task.condition_channels(channels), *noise.shape[2:]), np.float32)
    for index, row in enumerate(padded):
        if condition is not None and row.condition:
            sample[index, channels:] = condition[0]
    timestep = np.zeros(1, np.float32)
    inputs = {"sample": sample, "timestep": timestep, "encoder_hidden_states": embeddings}
    if (taken := unet.inputs.get(guidance.SCALE_INPUT)) is not None:
        inputs[guidance.SCALE_INPUT] = guidance.embed_scale(task.guidance_scale, int(taken.shape[1] or 0), len(padded))

    latents = noise * np.float32(sampler.init_noise_sigma)
    calls = len(sampler.timesteps)
    for index in range(calls):
        sample[:, :channels] = sampler.scale_model_input(latents, index)
        timestep[0] = sampler.timesteps[index]
        output = guidance.run(unet, inputs, batch)[: len(rows)]
        require_finite(
            output,
            "unet",
            hint=advice(manifest, entry.engine),
            task=task.name,
            step=index + 1,
            steps=calls,
            timestep=float(timestep[0]),
        )
        answers = np.split(output, len(output))
        guided = combine(task.guidance, answers, task.guidance_scale, task.image_guidance_scale)
        latents = sampler.step(guided, index, latents, None if draw is None else draw(index, latents.shape))
        if progress is not None:
            progress(index + 1, calls)
    return latents
