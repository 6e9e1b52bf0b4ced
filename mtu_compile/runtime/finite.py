"""Every network's output is looked at: NaN and Inf never become a picture."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtu_compile.bundle import EngineRef, Manifest
from mtu_compile.core.errors import NotFiniteError

Network = Literal["unet", "text_encoder", "text_encoder_2", "vae_encoder", "vae_decoder"]

#: What the networks are called in a message.
_CALLED = {
    "unet": "UNet",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "vae_encoder": "VAE encoder",
    "vae_decoder": "VAE decoder",
}


def require_finite(
    output: NDArray[Any],
    network: Network,
    *,
    hint: str,
    task: str | None = None,
    step: int | None = None,
    steps: int | None = None,
    timestep: float | None = None,
) -> NDArray[Any]:
    """``output`` as it is; ``NotFiniteError`` that says which network, task and step if it has NaN or Inf values.

    Args:
        hint: what to do about it, see ``advice``.
        task: whose UNet it is; the other networks are the same for all tasks.
        step, steps, timestep: where in the denoising, from 1.
    """
    bad = int(np.count_nonzero(~np.isfinite(output)))
    if not bad:
        return output
    whose = "" if task is None else f" of task {task!r}"
    where = "" if step is None else f" in step {step} of {steps} (timestep {timestep:g})"
    raise NotFiniteError(
        f"the {_CALLED[network]}{whose} gave {bad} NaN or Inf values of {output.size}{where}",
        network=network,
        task=task,
        step=step,
        hint=hint,
    )


def advice(manifest: Manifest, engine: EngineRef) -> str:
    """What helps a network of ``manifest`` that ran as ``engine`` says and was not finite."""
    if computes_in_half(manifest.precision, engine):
        return "float16 ends at 65504, and the network goes beyond it: build the bundle with --bf16 or --fp32"
    return (
        "float32 and bfloat16 end at 3.4e38, so a wider type does not help: its weights are spoilt, or it was given "
        "what it was not trained on"
    )


def computes_in_half(precision: str, engine: EngineRef) -> bool:
    """Whether an engine of a bundle in ``precision`` computes its floats in float16, as far as the two can tell."""
    named = engine.config.get("INFERENCE_PRECISION_HINT")
    return named == "f16" if named is not None else precision not in ("fp32", "bf16")
