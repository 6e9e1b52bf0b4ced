"""Watch a task's UNet at work: what goes into it and comes out while the pipeline makes a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.samples import Sample
from mtu_compile.core.finite import require_finite_original
from mtu_compile.core.tasks import Task

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Observation:
    """One run of a pipeline.

    Attributes:
        made: what the pipeline returned.
        inputs: of each UNet call, by name of the static graph's inputs, float32.
        outputs: of each UNet call, [b, 4, h, w], float32.
    """

    made: Any
    inputs: list[dict[str, Array]]
    outputs: list[Array]


def observe(
    pipeline: Any, task: Task, sample: Sample, *, size: tuple[int, int] | None, steps: int, **options: Any
) -> Observation:
    """Run ``pipeline`` (an ``MTUPipeline``) on ``sample`` and copy every UNet call.

    Args:
        size: height and width in pixels, ``None`` for the model's own.
        steps: denoising steps.
        options: of the pipeline, passed on.

    Raises:
        ModelError: a network of the float original gave NaN or Inf values; names network and step.
    """
    inputs: list[dict[str, Array]] = []
    outputs: list[Array] = []

    def keep(call: dict[str, Any], output: Any, timestep: float) -> None:
        seen = {name: tensor.float().cpu().numpy().copy() for name, tensor in call.items()}
        if not inputs:  # of what goes in only the latent changes
            require_finite_original(seen["encoder_hidden_states"], "the text encoder")
            require_finite_original(seen["sample"], f"the VAE encoder, for task {task.name!r},")
        inputs.append(seen)
        outputs.append(output.float().cpu().numpy().copy())
        step = f"step {len(inputs)} of {steps} (timestep {timestep:g})"
        require_finite_original(outputs[-1], f"the UNet of task {task.name!r}, in {step},")

    height, width = size or (None, None)
    made = pipeline(
        sample.prompt,
        task=task.name,
        image=sample.image,
        mask_image=sample.mask,
        height=height,
        width=width,
        num_inference_steps=steps,
        on_unet_call=keep,
        **options,
    )
    return Observation(made, inputs, outputs)
