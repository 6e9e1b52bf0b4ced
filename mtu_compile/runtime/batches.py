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
    """The answers [n, …] for n samples, in as few runs of the engine as its batch allows.

    Where an engine's batch is fixed and the last run has samples to spare, its last one is repeated, and the answers to
    that are dropped.

    Args:
        unet: the engine.
        inputs: arrays of n samples each, but for those in ``COMMON``, which every run gets.
    """
    samples, fixed = len(inputs["sample"]), batch_of(unet)
    most = fixed or unet.inputs["sample"].most or samples
    if samples == fixed or (fixed is None and samples <= most):
        return unet(inputs)
    runs = []
    for start in range(0, samples, most):
        rows = slice(start, start + most)
        runs.append(unet({key: one if key in COMMON else _filled(one[rows], fixed) for key, one in inputs.items()}))
    return {key: np.concatenate([run[key] for run in runs])[:samples] for key in runs[0]}


def _filled(rows: Array, batch: int | None) -> Array:
    """``rows``, the last one repeated until there are ``batch``."""
    missing = 0 if batch is None else batch - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows
