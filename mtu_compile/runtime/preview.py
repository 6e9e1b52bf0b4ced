"""What a picture will be, as the UNet sees it in the middle of its denoising."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtu_compile.runtime.schedulers import Scheduler
from mtu_compile.runtime.schedulers.base import denoised

Array = NDArray[Any]

#: Told of each step of each picture: which request (from 0), steps done, and what makes the picture so far. Making it
#: takes a run of the VAE decoder, so whoever watches asks for it when it is wanted.
Preview = Callable[[int, int, Callable[[], Image.Image]], None]


def clean_estimate(sampler: Scheduler, output: Array, index: int, sample: Array) -> Array:
    """The clean latent [1, C, h, w] that the guided prediction ``output`` of call ``index`` leads to.

    What the UNet is given has unit variance in every sampler: alpha · clean + sigma · noise, alpha² + sigma² = 1, with
    the alpha of the timestep it is told. Samplers that stop in between timesteps interpolate, and so does this.
    """
    alphas = sampler.alphas_cumprod
    alpha = math.sqrt(float(np.interp(float(sampler.timesteps[index]), np.arange(len(alphas)), alphas)))
    seen = sampler.scale_model_input(sample, index)
    if alpha < 1e-4 and sampler.prediction_type == "epsilon":  # all noise: dividing by alpha says nothing
        return np.zeros_like(seen)
    return denoised(sampler.prediction_type, output, seen, alpha, math.sqrt(max(0.0, 1 - alpha * alpha)))
