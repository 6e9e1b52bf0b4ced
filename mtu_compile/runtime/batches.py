"""Any number of UNet samples through an engine whose batch is fixed, or free."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mtu_compile.core.errors import TargetError
from mtu_compile.runtime.engine import Array, Engine

#: The inputs that all samples of a call share; every other one has a row for each sample.
COMMON = frozenset({"timestep"})


def batch_of(unet: Engine) -> int | None:
    """How many samples an engine computes at once; ``None`` if any number."""
    return unet.inputs["sample"].shape[0]


def count_samples(name: str, inputs: Mapping[str, Array]) -> int:
    """Samples of a call; ``TargetError`` if there are none, or its inputs are not of equally many."""
    counts = {key: len(array) for key, array in inputs.items() if key not in COMMON}
    samples = counts["sample"]
    if not samples:
        raise TargetError(f"{name} was given no sample")
    for key, count in counts.items():
        if count != samples:
            raise TargetError(f"{name} was given {samples} samples, and {count} of {key!r}")
    return samples


def run_samples(unet: Engine, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The answers [n, …] for n samples, in as many runs of the engine as its batch makes of them.

    Where the last run has samples to spare, its last one is repeated, and the answers to that are dropped.

    Args:
        unet: the engine.
        inputs: arrays of n samples each, but for those in ``COMMON``, which every run gets.
    """
    samples = len(inputs["sample"])
    batch = batch_of(unet) or samples
    if samples == batch:
        return unet(inputs)
    runs = []
    for start in range(0, samples, batch):
        part = {key: one if key in COMMON else _rows(one, start, batch) for key, one in inputs.items()}
        runs.append(unet(part))
    return {key: np.concatenate([run[key] for run in runs])[:samples] for key in runs[0]}


def _rows(array: Array, start: int, batch: int) -> Array:
    """``batch`` rows from ``start``; beyond the end, the last one again."""
    rows = array[start : start + batch]
    missing = batch - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows
