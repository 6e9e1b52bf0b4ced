"""A part of a large tensor that stands for all of it where magnitudes are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Numbers of one tensor that are counted. A quantiser's range comes from the shape of their distribution, and its tail
#: from all tensors of all calls together; counting takes 15 ns for each, a third of what computing them takes.
MOST = 1 << 18


def some_of(array: NDArray[Any], most: int = MOST) -> NDArray[Any]:
    """Up to ``most`` numbers of ``array``, evenly spread; all where they are not more.

    The step is odd, so that no column of a feature map, whose sides are even, is left out. Extremes may be: one that
    were always among a few would count for more than it is.
    """
    flat = np.ravel(array)
    return flat if flat.size <= most else flat[:: -(-flat.size // most) | 1]
