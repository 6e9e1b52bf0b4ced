"""The float original is what everything is held against, so it has to be numbers itself."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import ModelError


def require_finite_original(output: NDArray[Any], what: str) -> None:
    """``ModelError`` that says ``what`` gave it if an output of the float original has NaN or Inf values."""
    bad = int(np.count_nonzero(~np.isfinite(output)))
    if bad:
        raise ModelError(
            f"{what} of the model itself, in {output.dtype}, gave {bad} NaN or Inf values of {output.size}",
            hint="the model is spoilt, or not made for this size or sampler: what is compiled from it is no better",
        )
