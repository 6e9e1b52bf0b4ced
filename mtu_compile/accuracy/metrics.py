"""What accuracy is measured in: UNet outputs, guidance deltas, latents, and PSNR and SSIM of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import AccuracyError
from mtu_compile.core.guidance import DIRECTIONS, ROWS, Guidance

Array = NDArray[Any]
Feed = Mapping[str, Array]

#: Decibels given to arrays that are equal: above what float64 can tell apart (about 320 dB is its own rounding noise,
#: float32's is near 140), and finite, so that it can be written as JSON.
EQUAL_DB = 200.0

#: Side of SSIM's Gaussian window (Wang et al., 2004); a smaller picture has no SSIM.
SSIM_WINDOW = 11


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
    pairs = [(_wide(array), _wide(candidate[name])) for name, array in reference.items()]
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
    want = _wide(reference).reshape(batch, pictures, *reference.shape[1:])
    have = _wide(candidate).reshape(batch, pictures, *reference.shape[1:])
    metrics = []
    for direction in DIRECTIONS[guidance]:
        expected, found = (side[direction.end] - side[direction.start] for side in (want, have))
        norm, found_norm = float(np.linalg.norm(expected)), float(np.linalg.norm(found))
        error = float(np.sum(np.square(expected - found)))
        metrics.append(
            GuidanceMetrics(
                direction.name, _ratio(norm, found_norm), cosine(expected, found), norm**2, found_norm**2, error
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
            worst_ratio=max((delta.ratio for delta in deltas), key=_distance),
            cosine=min(delta.cosine for delta in deltas),
            sqnr_db=decibels(energy, sum(delta.error_energy for delta in deltas)),
        )
    return pooled


def _ratio(norm: float, candidate: float) -> float:
    """How much of a delta's norm is left; finite where the reference has no delta."""
    return candidate / norm if norm else 1.0 + candidate


def _distance(ratio: float) -> float:
    """How far a ratio is from 1: a half and a double are equally far."""
    return abs(math.log(max(ratio, 1e-12)))


def sqnr_db(reference: Array, candidate: Array) -> float:
    """Signal-to-quantisation-noise ratio of arrays of equal shape in decibels, from −200 to 200 (equal arrays)."""
    want, have = _pair(reference, candidate)
    return decibels(float(np.sum(np.square(want))), float(np.sum(np.square(want - have))))


def cosine(reference: Array, candidate: Array) -> float:
    """Cosine similarity of two arrays of equal shape; two zero arrays have 1, one zero array 0."""
    want, have = _pair(reference, candidate)
    norms = float(np.linalg.norm(want)), float(np.linalg.norm(have))
    if min(norms) == 0.0:
        return 1.0 if max(norms) == 0.0 else 0.0
    return float(np.clip(np.vdot(want / norms[0], have / norms[1]), -1.0, 1.0))


def psnr_db(reference: Array, candidate: Array, *, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in decibels, at most 200 (equal arrays).

    Args:
        peak: the largest possible value; the reference's range (max − min) if not given, which suits latents.
    """
    want, have = _pair(reference, candidate)
    if peak is None:
        peak = float(want.max() - want.min())
    return decibels(peak**2, float(np.mean(np.square(want - have))))


def image_metrics(reference: Array, candidate: Array) -> tuple[float, float]:
    """PSNR (decibels, peak 1) and SSIM of two pictures [H, W, 3], uint8 or floats in [0, 1].

    SSIM is that of Wang et al., 2004: Gaussian window of 11, sigma 1.5, mean over pixels and channels.

    Raises:
        AccuracyError: pictures of different or other shapes, smaller than the window, or not finite.
    """
    from skimage.metrics import structural_similarity

    want, have = _pair(unit_picture(reference), unit_picture(candidate))
    similarity = structural_similarity(
        want, have, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return psnr_db(want, have, peak=1.0), float(similarity)


def _wide(array: Array) -> NDArray[np.float64]:
    return np.asarray(array, dtype=np.float64)


def _pair(reference: Array, candidate: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both in float64; ``AccuracyError`` unless they are finite and of the same, non-empty shape."""
    want, have = _wide(reference), _wide(candidate)
    if want.shape != have.shape or want.size == 0:
        raise AccuracyError(f"arrays of shapes {want.shape} and {have.shape} cannot be compared")
    if not (np.isfinite(want).all() and np.isfinite(have).all()):
        raise AccuracyError("an array that has to be compared has NaN or Inf values")
    return want, have


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise), from −200 to 200 and so finite."""
    if noise == 0.0:
        return EQUAL_DB
    if signal == 0.0:
        return -EQUAL_DB
    return float(np.clip(10 * math.log10(signal / noise), -EQUAL_DB, EQUAL_DB))


def unit_picture(picture: Array) -> NDArray[np.float64]:
    """A picture [H, W, 3], uint8 or floats in [0, 1], as float64 in [0, 1]; ``AccuracyError`` if it is not one."""
    if picture.ndim != 3 or picture.shape[-1] != 3 or min(picture.shape[:2]) < SSIM_WINDOW:
        raise AccuracyError(f"a picture of shape {picture.shape} is not [H, W, 3] with sides of {SSIM_WINDOW} or more")
    wide = _wide(picture) / (255.0 if picture.dtype == np.uint8 else 1.0)
    if np.isfinite(wide).all() and (wide.min() < -1e-6 or wide.max() > 1 + 1e-6):
        raise AccuracyError(f"a float picture ranges from {wide.min():.3g} to {wide.max():.3g}, not within [0, 1]")
    return wide
