"""Record what the float original does, so that a bundle can be checked against it anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from calibration.observe import observe
from calibration.samples import Sample
from mtu_compile.core.fit import Fit
from mtu_compile.core.noise import initial_noise
from mtu_compile.core.tasks import Task
from mtu_compile.runtime.fitting import fit_picture
from mtu_compile.runtime.reference import Reference, Trajectory


def record_reference(
    pipeline: Any,
    task: Task,
    samples: Sequence[Sample],
    *,
    size: tuple[int, int],
    steps: int,
    seed: int = 0,
    fit: Fit = "crop",
    producer: str,
    progress: Callable[[int], None] | None = None,
) -> Reference:
    """Make one picture per sample with the float pipeline and keep every UNet call.

    Args:
        pipeline: an ``MTUPipeline`` in float32.
        size: height and width in pixels.
        steps: denoising steps.
        seed: sample ``i`` starts from the noise of ``seed + i``.
        fit: what becomes of pictures of other proportions.
        producer: what made the reference, for the record.
    """
    trajectories = []
    for i, sample in enumerate(samples):
        trajectories.append(_trajectory(pipeline, task, sample, size=size, steps=steps, seed=seed + i, fit=fit))
        if progress is not None:
            progress(1)
    return Reference(task=task.name, steps=steps, producer=producer, trajectories=tuple(trajectories))


def _trajectory(
    pipeline: Any, task: Task, sample: Sample, *, size: tuple[int, int], steps: int, seed: int, fit: Fit
) -> Trajectory:
    import torch

    height, width = size
    scale = pipeline.vae_scale
    shape = (1, pipeline.unet.latent_channels, height // scale, width // scale)
    noise = initial_noise(seed, shape)
    latents = torch.from_numpy(noise.copy())
    seen = observe(
        pipeline, task, sample, size=size, steps=steps, seed=seed, latents=latents, fit=fit, paste_unmasked=False
    )
    return Trajectory(
        prompt=sample.prompt,
        seed=seed,
        image=None if sample.image is None else sample.image.convert("RGB"),
        mask=None if sample.mask is None else sample.mask.convert("L"),
        inputs=seen.inputs,
        outputs=np.stack(seen.outputs),
        noise=noise,
        latents=seen.made.latents.float().cpu().numpy(),
        picture=seen.made.images[0],
        target=None if sample.target is None else fit_picture(sample.target, size, fit),
    )
