"""Times of kernels as they would be if nothing else ran."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def undisturbed(runs: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of each kernel over the runs in which no other process got between: those below twice the median.

    Args:
        runs: [runs, kernels] in microseconds.
        errors: [runs], how wrong one may be.
    """
    typical = np.median(runs, axis=0)
    quiet = runs <= 2 * typical + errors[:, None]
    mean: NDArray[np.float64] = (runs * quiet).sum(axis=0) / np.maximum(1, quiet.sum(axis=0))
    return np.maximum(mean, 0.0, out=mean)
