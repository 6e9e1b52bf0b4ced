"""The metrics of a task's accuracy, one entry each. Whoever adds one adds it to ``METRICS``, and nowhere else.

An entry says what a metric is called, in which direction it is better, how it is drawn from what was measured, to
which tasks it applies, what is shown of it, and its default threshold for each precision. Checks, thresholds files,
manifests, reports and the command's table follow from that. Its unit is the last word of its name
(``mtu_compile.bundle.units``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mtu_compile.accuracy.formulas import colour_difference, picture_psnr_db, psnr_db, ssim
from mtu_compile.accuracy.metric import Figure, Metric, Subject, by_precision, less
from mtu_compile.accuracy.pictures import Perceptual
from mtu_compile.accuracy.readings import (
    ChangedShare,
    MeanClip,
    MeanTruth,
    PerCall,
    PerDelta,
    PerPicture,
    PooledDeltas,
    PooledRegion,
)
from mtu_compile.core.guidance import DIRECTIONS
from mtu_compile.runtime import Result
from mtu_compile.runtime.reference import Trajectory

NO_SCIKIT_IMAGE = "not measured: scikit-image is not installed here"


def _needs_scikit_image(subject: Subject, worst: float | None) -> str | None:
    return NO_SCIKIT_IMAGE if worst is None else None


def _needs_guidance(subject: Subject, worst: float | None) -> str | None:
    return None if DIRECTIONS[subject.task.guided] else "does not apply: the task has no guidance"


def _needs_torch(subject: Subject, worst: float | None) -> str | None:
    if subject.perceptual.vif is None:
        return str(subject.perceptual.reason)
    return "not measured: the pictures are too small, or blank" if worst is None else None


def _needs_change(subject: Subject, worst: float | None) -> str | None:
    if not subject.measured.regions:
        return "does not apply: the task makes the whole picture"
    return "does not apply: the float original changes nothing" if worst is None else None


def _needs_rest(subject: Subject, worst: float | None) -> str | None:
    if not subject.measured.regions:
        return "does not apply: the task makes the whole picture"
    return "does not apply: nothing of the pictures was to stay" if worst is None else None


def _needs_clip(subject: Subject, worst: float | None) -> str | None:
    given = subject.perceptual.clip is not None
    return None if given else "not measured: no CLIP model was given (mtu-compile check --clip DIR)"


def _needs_truth(subject: Subject, worst: float | None) -> str | None:
    if not subject.task.condition:
        return "not judged: a picture made of words alone has no single right answer"
    return None if subject.wanted else "does not apply: the data have no wanted pictures"


def _psnr_lost(trajectory: Trajectory, candidate: Result, perceptual: Perceptual) -> float | None:
    """By how much the candidate is further from the wanted picture than the float original, decibels."""
    if trajectory.target is None:
        return None
    truth = np.asarray(trajectory.target)
    return picture_psnr_db(truth, np.asarray(trajectory.picture)) - picture_psnr_db(truth, np.asarray(candidate.image))


def _vif(trajectory: Trajectory, candidate: Result, perceptual: Perceptual) -> float | None:
    if perceptual.vif is None:
        return None
    return perceptual.vif(np.asarray(trajectory.picture), np.asarray(candidate.image))


def _of_pictures(formula: Callable[[Any, Any], float | None]) -> PerPicture:
    """A formula for two pictures [H, W, 3], uint8: the float original's and the candidate's."""
    return PerPicture(
        lambda trajectory, candidate, _: formula(np.asarray(trajectory.picture), np.asarray(candidate.image))
    )


METRICS: tuple[Metric, ...] = (
    Metric(
        "sqnr_db",
        "more",
        PerCall(lambda call: call.sqnr_db),
        (
            Figure("worst_sqnr_db", "UNet SQNR, worst call", column="UNet SQNR dB\nworst / mean"),
            Figure(
                "mean_sqnr_db",
                "UNet SQNR, mean of the calls",
                "mean",
                judged=False,
                column="UNet SQNR dB\nworst / mean",
            ),
        ),
        defaults=by_precision(int8=17.0, int4_weights=12.0, bf16=24.0, fp16=30.0, fp32=60.0),
    ),
    Metric(
        "cosine",
        "more",
        PerCall(lambda call: call.cosine),
        (Figure("worst_cosine", "UNet cosine, worst call"),),
        defaults=by_precision(int8=0.98, int4_weights=0.97, bf16=0.998, fp16=0.999, fp32=0.99999),
    ),
    Metric(  # of a guidance delta's norm
        "guidance_ratio",
        "one",
        PerDelta(lambda delta: delta.ratio),
        (
            Figure("guidance_ratio", "guidance deltas, norm against the original's, single calls", "span"),
            Figure("guidance.{direction}.worst_ratio", "{direction} guidance, norm against the original's, worst call"),
        ),
        _needs_guidance,
        by_precision(int8=0.7, int4_weights=0.6, bf16=0.85, fp16=0.9, fp32=0.99),
    ),
    Metric(
        "guidance_cosine",
        "more",
        PerDelta(lambda delta: delta.cosine),
        (Figure("guidance.{direction}.cosine", "{direction} guidance, cosine, worst call"),),
        _needs_guidance,
        by_precision(int8=0.7, int4_weights=0.7, bf16=0.95, fp16=0.98, fp32=0.9999),
    ),
    Metric(
        "pooled_guidance_ratio",
        "one",
        PooledDeltas(lambda pooled: pooled.ratio),
        (
            Figure(
                "guidance.{direction}.ratio",
                "{direction} guidance, norm against the original's, all calls together",
                column="deltas left\ntext / image",
                form="{:.2f}".format,
            ),
        ),
        _needs_guidance,
        by_precision(int8=0.94, int4_weights=0.9, bf16=0.95, fp16=0.97, fp32=0.999),
    ),
    Metric(
        "guidance_sqnr_db",
        "more",
        PooledDeltas(lambda pooled: pooled.sqnr_db),
        (Figure("guidance.{direction}.sqnr_db", "{direction} guidance, SQNR, all calls together"),),
        _needs_guidance,
        by_precision(int8=12.5, int4_weights=14.0, bf16=16.0, fp16=22.0, fp32=50.0),
    ),
    Metric(
        "latent_psnr_db",  # its peak is the reference's range
        "more",
        PerPicture(lambda trajectory, candidate, _: psnr_db(trajectory.latents, candidate.latents)),
        (Figure("latent_psnr_db", "final latents, PSNR", column="latent\ndB"),),
        defaults=by_precision(int8=25.0, int4_weights=18.0, bf16=26.0, fp16=30.0, fp32=60.0),
    ),
    Metric(
        "image_psnr_db",
        "more",
        _of_pictures(picture_psnr_db),
        (Figure("image_psnr_db", "pictures, PSNR", column="image\ndB"),),
        defaults=by_precision(int8=25.0, int4_weights=20.0, bf16=28.0, fp16=32.0, fp32=50.0),
    ),
    Metric(
        "ssim",
        "more",
        _of_pictures(ssim),
        (Figure("ssim", "pictures, SSIM", column="SSIM", form="{:.3f}".format),),
        _needs_scikit_image,
        by_precision(int8=0.9, int4_weights=0.85, bf16=0.95, fp16=0.97, fp32=0.999),
        less(0.05),  # room for larger pictures, where others report 0.94 to 0.98 for INT8
    ),
    Metric(
        "vif",
        "more",
        PerPicture(_vif),
        (Figure("vif", "pictures, VIF", column="VIF", form="{:.3f}".format),),
        _needs_torch,
        by_precision(int8=0.5, int4_weights=0.45, bf16=0.7, fp16=0.8, fp32=0.95),
        less(0.2),
    ),
    Metric(
        "colour_difference",
        "less",
        _of_pictures(colour_difference),
        (Figure("colour_difference", "pictures, mean colour difference (CIEDE2000)"),),
        _needs_scikit_image,
    ),
    Metric(
        "inside_psnr_db",
        "more",
        PooledRegion(lambda region: region.inside_psnr_db, lambda region: region.inside_pixels),
        (Figure("inside_psnr_db", "pictures, PSNR where the task changes them", column="inside / out\ndB"),),
        _needs_change,
        by_precision(int8=25.0, int4_weights=22.0, bf16=28.0, fp16=32.0, fp32=50.0),
    ),
    Metric(
        "outside_psnr_db",
        "more",
        PooledRegion(lambda region: region.outside_psnr_db, lambda region: region.outside_pixels),
        (Figure("outside_psnr_db", "pictures, PSNR where the task leaves them alone", column="inside / out\ndB"),),
        _needs_rest,
        by_precision(int8=25.0, int4_weights=24.0, bf16=30.0, fp16=34.0, fp32=50.0),
    ),
    Metric(
        "region.share",
        "more",
        ChangedShare(),
        (Figure("region.share", "share of the pictures that the task changes"),),
    ),
    Metric(
        "region.source_psnr_db",
        "more",
        PooledRegion(lambda region: region.source_psnr_db, lambda region: region.outside_pixels),
        (Figure("region.source_psnr_db", "PSNR to the source where the task leaves it alone"),),
    ),
    Metric(
        "region.reference_source_psnr_db",
        "more",
        PooledRegion(lambda region: region.reference_source_psnr_db, lambda region: region.outside_pixels),
        (Figure("region.reference_source_psnr_db", "the same of the float original"),),
    ),
    Metric(
        "truth_drop_db",
        "less",
        PerPicture(_psnr_lost),
        (
            Figure(
                "truth_drop_db",
                "PSNR lost against the wanted pictures",
                column="truth\ndB",
                form=lambda lost: f"{-lost:+.2f}",
            ),
        ),
        _needs_truth,
        by_precision(int8=0.6, int4_weights=1.0, bf16=0.5, fp16=0.3, fp32=0.05),
        lambda lost: max(lost, 0.0) + 0.3,
    ),
    Metric(
        "truth.psnr_db",
        "more",
        MeanTruth(lambda truth: truth.psnr_db),
        (Figure("truth.psnr_db", "PSNR to the wanted pictures"),),
    ),
    Metric(
        "truth.ssim",
        "more",
        MeanTruth(lambda truth: truth.ssim),
        (Figure("truth.ssim", "SSIM to the wanted pictures"),),
    ),
    Metric(
        "truth.reference_psnr_db",
        "more",
        MeanTruth(lambda truth: truth.reference_psnr_db),
        (Figure("truth.reference_psnr_db", "PSNR to the wanted pictures of the float original"),),
    ),
    Metric(
        "truth.reference_ssim",
        "more",
        MeanTruth(lambda truth: truth.reference_ssim),
        (Figure("truth.reference_ssim", "SSIM to the wanted pictures of the float original"),),
    ),
    Metric(
        "clip_cosine",  # of embeddings, as all CLIP says
        "more",
        MeanClip(lambda clip: clip.image),
        (Figure("clip.image", "CLIP, likeness of the two pictures"),),
        _needs_clip,
    ),
    Metric(
        "clip_text_cosine",
        "more",
        MeanClip(lambda clip: clip.text),
        (Figure("clip.text", "CLIP, likeness to the prompt"),),
        _needs_clip,
    ),
    Metric(
        "clip_reference_text_cosine",
        "more",
        MeanClip(lambda clip: clip.reference_text),
        (Figure("clip.reference_text", "CLIP, likeness to the prompt of the float original"),),
        _needs_clip,
    ),
)

#: Labels of groups, where they are not their name.
GROUPS: Mapping[str, str] = {"clip": "CLIP"}


def judged() -> tuple[Metric, ...]:
    """The metrics that have thresholds."""
    return tuple(metric for metric in METRICS if metric.defaults is not None)
