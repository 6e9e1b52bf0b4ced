"""The formulas accuracy is measured with, on plain arrays: decibels, cosine, PSNR, SSIM, CIEDE2000."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import AccuracyError

Array = NDArray[Any]

#: Decibels given to arrays that are equal: above what float64 can tell apart (about 320 dB is its own rounding noise,
#: float32's is near 140), and finite, so that it can be written as JSON.
EQUAL_DB = 200.0

#: Side of SSIM's Gaussian window (Wang et al., 2004); a smaller picture has no SSIM.
SSIM_WINDOW = 11


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


def ssim(reference: Array, candidate: Array) -> float | None:
    """Structural similarity of two pictures [H, W, 3], uint8 or floats in [0, 1]; ``None`` without scikit-image.

    That of Wang et al., 2004: Gaussian window of 11, sigma 1.5, mean over pixels and channels.

    Raises:
        AccuracyError: pictures of different or other shapes, smaller than the window, or not finite.
    """
    want, have = _pair(unit_picture(reference), unit_picture(candidate))
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    return float(
        structural_similarity(
            want, have, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
    )


def picture_psnr_db(reference: Array, candidate: Array) -> float:
    """``psnr_db`` of two pictures [H, W, 3], uint8 or floats in [0, 1]; their peak is 1."""
    return psnr_db(unit_picture(reference), unit_picture(candidate), peak=1.0)


def colour_difference(reference: Array, candidate: Array) -> float | None:
    """Mean CIEDE2000 over the pixels of two pictures [H, W, 3] in sRGB; ``None`` without scikit-image.

    The CIE's formula of 2001 (Sharma et al., 2005): about 1 is the least difference that is seen, black and white are
    100 apart.
    """
    try:
        from skimage.color import deltaE_ciede2000, rgb2lab
    except ImportError:
        return None
    return float(np.mean(deltaE_ciede2000(rgb2lab(unit_picture(reference)), rgb2lab(unit_picture(candidate)))))


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
    wide = float64(picture) / (255.0 if picture.dtype == np.uint8 else 1.0)
    if np.isfinite(wide).all() and (wide.min() < -1e-6 or wide.max() > 1 + 1e-6):
        raise AccuracyError(f"a float picture ranges from {wide.min():.3g} to {wide.max():.3g}, not within [0, 1]")
    return wide


def float64(array: Array) -> NDArray[np.float64]:
    """Wide enough for sums of squares over a batch."""
    return np.asarray(array, dtype=np.float64)


def _pair(reference: Array, candidate: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both in float64; ``AccuracyError`` unless they are finite and of the same, non-empty shape."""
    want, have = float64(reference), float64(candidate)
    if want.shape != have.shape or want.size == 0:
        raise AccuracyError(f"arrays of shapes {want.shape} and {have.shape} cannot be compared")
    if not (np.isfinite(want).all() and np.isfinite(have).all()):
        raise AccuracyError("an array that has to be compared has NaN or Inf values")
    return want, have
