"""Gaussian noise by seed: the same numbers in the float reference, in calibration and on boards."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def initial_noise(seed: int | None, shape: Sequence[int]) -> NDArray[np.float32]:
    """What a trajectory starts from: [1, C, h, w], unit variance; random for ``None``."""
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape), dtype=np.float32)


def step_noise(seed: int, call: int, shape: Sequence[int]) -> NDArray[np.float32]:
    """What a sampler with fresh noise (Euler ancestral, LCM, …) draws after UNet call ``call``; unit variance.

    It depends on the seed and the call alone, not on what was drawn before: runs that draw more or less often, or in
    another order, have the same noise where they have any.
    """
    numbers = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(call,)))
    return np.random.Generator(numbers).standard_normal(tuple(shape), dtype=np.float32)
