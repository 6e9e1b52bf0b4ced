"""UNet calls of a candidate against the recorded ones: outputs, and what became of the guidance deltas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtu_compile.accuracy.formulas import Array, cosine, decibels, float64, sqnr_db
from mtu_compile.core.errors import AccuracyError
from mtu_compile.core.guidance import DIRECTIONS, ROWS, Guidance

Feed = Mapping[str, Array]


@dataclass(frozen=True)
class GuidanceMetrics:
    """How one direction of classifier-free guidance survived.

    The guidance delta is the difference of two samples of one UNet batch. An engine can agree well with the reference
    on every sample and still lose the delta, which is small and is then multiplied by the guidance scale.

    Attributes:
        direction: ``"text"`` or ``"image"``.
        ratio: norm of the candidate's delta divided by the reference's; 1 is perfect.
        cosine: cosine similarity of the two deltas.
        energy, candidate_energy, error_energy: squared norms of the reference's delta, of the candidate's, and of their
            difference: what ``pool_guidance`` adds up.
    """

    direction: str
    ratio: float
    cosine: float
    energy: float
    candidate_energy: float
    error_energy: float


@dataclass(frozen=True)
class PooledGuidance:
    """How one direction of guidance survived all UNet calls of a task.

    At a timestep where a direction has next to nothing to say, the ratio of that call alone says little about the
    picture; pooled over the calls, each counts by its size.

    Attributes:
        ratio: √(Σ |candidate's delta|² / Σ |reference's delta|²) over the calls; 1 is perfect.
        worst_ratio: of the single calls, the ratio furthest from 1.
        cosine: of the single calls, the least cosine.
        sqnr_db: 10·log10(Σ |reference's delta|² / Σ |difference of the deltas|²) over the calls, decibels.
    """

    ratio: float
    worst_ratio: float
    cosine: float
    sqnr_db: float


@dataclass(frozen=True)
class StepMetrics:
    """One UNet call of a candidate against the recorded reference.

    Attributes:
        timestep: the scheduler's timestep, or ``None`` if the recording has none.
        sqnr_db: 10·log10(Σ reference² / Σ (reference − candidate)²) over all outputs, decibels.
        cosine: cosine similarity, the smallest over the outputs.
        max_abs: largest absolute difference.
        max_rel: ``max_abs`` divided by the largest magnitude of the reference.
        guidance: one entry per guidance direction of the task.
    """

    timestep: float | None
    sqnr_db: float
    cosine: float
    max_abs: float
    max_rel: float
    guidance: tuple[GuidanceMetrics, ...] = ()


def step_metrics(
    reference: Feed, candidate: Feed, *, timestep: float | None, guidance: Guidance = "none"
) -> StepMetrics:
    """Metrics of one UNet call; both arguments hold arrays by output name, of the same names and shapes."""
    pairs = [(float64(array), float64(candidate[name])) for name, array in reference.items()]
    differences = [np.abs(want - have).max() for want, have in pairs]
    peak = max(float(np.abs(want).max()) for want, _ in pairs)
    largest = float(max(differences))
    return StepMetrics(
        timestep=timestep,
        sqnr_db=sqnr_db(*(np.concatenate([array.ravel() for array in side]) for side in zip(*pairs, strict=True))),
        cosine=min(cosine(want, have) for want, have in pairs),
        max_abs=largest,
        max_rel=largest / peak if peak else largest,
        guidance=guidance_metrics(*pairs[0], guidance),
    )


def guidance_metrics(reference: Array, candidate: Array, guidance: Guidance) -> tuple[GuidanceMetrics, ...]:
    """How the guidance deltas of one UNet output [b, 4, h, w] survived; empty without guidance.

    Raises:
        AccuracyError: the batch is not a whole number of guided pictures.
    """
    batch = len(ROWS[guidance])
    if reference.shape[0] % batch:
        samples = reference.shape[0]
        raise AccuracyError(f"guidance {guidance!r} takes {batch} samples a picture, the output has {samples}")
    pictures = reference.shape[0] // batch
    want = float64(reference).reshape(batch, pictures, *reference.shape[1:])
    have = float64(candidate).reshape(batch, pictures, *reference.shape[1:])
    metrics = []
    for direction in DIRECTIONS[guidance]:
        expected, kept = (side[direction.end] - side[direction.start] for side in (want, have))
        norm, kept_norm = float(np.linalg.norm(expected)), float(np.linalg.norm(kept))
        error = float(np.sum(np.square(expected - kept)))
        metrics.append(
            GuidanceMetrics(
                direction.name, _ratio(norm, kept_norm), cosine(expected, kept), norm**2, kept_norm**2, error
            )
        )
    return tuple(metrics)


def pool_guidance(steps: Sequence[StepMetrics]) -> dict[str, PooledGuidance]:
    """Each guidance direction over all of ``steps``; empty without guidance."""
    directions: dict[str, list[GuidanceMetrics]] = {}
    for step in steps:
        for delta in step.guidance:
            directions.setdefault(delta.direction, []).append(delta)
    pooled = {}
    for direction, deltas in directions.items():
        energy = sum(delta.energy for delta in deltas)
        pooled[direction] = PooledGuidance(
            ratio=_ratio(math.sqrt(energy), math.sqrt(sum(delta.candidate_energy for delta in deltas))),
            worst_ratio=max((delta.ratio for delta in deltas), key=distance),
            cosine=min(delta.cosine for delta in deltas),
            sqnr_db=decibels(energy, sum(delta.error_energy for delta in deltas)),
        )
    return pooled


def _ratio(norm: float, candidate: float) -> float:
    """How much of a delta's norm is left; finite where the reference has no delta."""
    return candidate / norm if norm else 1.0 + candidate


def distance(ratio: float) -> float:
    """How far a ratio is from 1: a half and a double are equally far."""
    return abs(math.log(max(ratio, 1e-12)))
