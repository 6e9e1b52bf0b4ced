"""The metrics of a task's accuracy, one entry each. Whoever adds one adds it to ``METRICS``, and nowhere else.

An entry says what a metric is called, in which direction it is better, how it is drawn from what was measured, to
which tasks it applies, what is shown of it, and its default threshold for each precision. Checks, thresholds files,
manifests, reports and the command's table follow from that. Its unit is the last word of its name
(``mtu_compile.bundle.units``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np

from mtu_compile.accuracy.calls import distance
from mtu_compile.accuracy.formulas import colour_difference, picture_psnr_db, psnr_db, ssim
from mtu_compile.accuracy.pictures import Perceptual, changed_region, region_metrics, truth_metrics
from mtu_compile.accuracy.readings import (
    ChangedShare,
    Draw,
    MeanClip,
    MeanTruth,
    PerCall,
    PerDelta,
    PerPicture,
    PooledDeltas,
    PooledRegion,
    Reading,
)
from mtu_compile.accuracy.task_metrics import PictureMetrics, TaskMetrics
from mtu_compile.bundle.units import Unit, last_word, unit_of
from mtu_compile.core.fit import Fit
from mtu_compile.core.guidance import DIRECTIONS
from mtu_compile.core.precision import Precision
from mtu_compile.core.tasks import Task
from mtu_compile.runtime import Result
from mtu_compile.runtime.reference import Trajectory

#: ``"one"`` is a ratio: it may shrink to its threshold and grow to the threshold's inverse.
Better = Literal["more", "less", "one"]

#: A number of a summary, or the least and the largest of several.
Value = float | tuple[float, float]

#: Stands for a direction of guidance in the key and the label of a figure.
DIRECTION = "{direction}"


@dataclass(frozen=True)
class Subject:
    """What a metric may or may not apply to.

    Attributes:
        task: its description.
        measured: what was measured of it.
        perceptual: the metrics that need torch, where there are any.
        wanted: whether the data have the pictures that were wanted.
    """

    task: Task
    measured: TaskMetrics
    perceptual: Perceptual
    wanted: bool


@dataclass(frozen=True)
class Figure:
    """A number that is shown of a metric.

    Attributes:
        key: its place in a task's summary, groups parted by dots; with ``DIRECTION`` one for each direction.
        label: for people, without the unit.
        pick: which of the readings: the worst, their mean, or the least and the largest.
        judged: whether the metric's threshold says how large it may be.
        column: heading in the command's table, several of one heading side by side; ``""`` is not shown there.
        form: how it is written there.
    """

    key: str
    label: str
    pick: Literal["worst", "mean", "span"] = "worst"
    judged: bool = True
    column: str = ""
    form: Callable[[float], str] = "{:.1f}".format

    def places(self) -> tuple[str, ...]:
        """Its key, or one for each direction of guidance."""
        if DIRECTION not in self.key:
            return (self.key,)
        return tuple(self.key.replace(DIRECTION, direction) for direction in ("text", "image"))

    def fits(self, key: str) -> str | None:
        """The label of ``key`` if that is this figure's place."""
        if DIRECTION not in self.key:
            return self.label if key == self.key else None
        before, after = self.key.split(DIRECTION)
        direction = key.removeprefix(before).removesuffix(after)
        if "." in direction or self.key.replace(DIRECTION, direction) != key:
            return None
        return self.label.replace(DIRECTION, direction)


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: in thresholds and failures; its last word is its unit.
        better: in which direction.
        draw: its readings in what was measured.
        figures: what is shown of it.
        absent: why it does not apply to a task, or cannot be measured here; ``None`` where it has to be there. Told
            what it applies to, and the worst reading.
        defaults: by precision, a threshold that tells a defect from rounding, whatever the model; ``None`` leaves the
            metric unjudged.
        margin: how far from a measured value a threshold suggested for it lies; ``None`` for its unit's.
    """

    name: str
    better: Better
    draw: Draw
    figures: tuple[Figure, ...]
    absent: Callable[[Subject, float | None], str | None] = lambda subject, worst: None
    defaults: Mapping[Precision, float] | None = None
    margin: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if unit_of(self.name) is None:
            raise ValueError(f"{self.name} does not end in a unit of mtu_compile.bundle.units")
        if self.defaults is not None and self.margin is None and last_word(self.name) not in MARGINS:
            raise ValueError(f"{self.name} is judged, and has no margin")

    @property
    def unit(self) -> Unit:
        unit = unit_of(self.name)
        assert unit is not None
        return unit

    @property
    def of_calls(self) -> bool:
        """Whether it is read at each UNet call, for which no picture is needed."""
        return isinstance(self.draw, (PerCall, PerDelta))

    def readings(self, measured: TaskMetrics) -> Sequence[Reading]:
        return self.draw(measured, self.name)

    def worst(self, measured: TaskMetrics) -> float | None:
        """Of the readings; ``None`` where there is none."""
        return self.worst_of([reading.value for reading in self.readings(measured)])

    def worst_of(self, values: Sequence[float | None]) -> float | None:
        """The value that is furthest from perfect."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        if self.better == "one":
            return max(known, key=distance)
        return min(known) if self.better == "more" else max(known)

    def missed(self, value: float | None, threshold: float) -> tuple[float, bool] | None:
        """The limit that ``value`` is beyond, and whether it is above it; ``None`` if it passes.

        NaN is neither above nor below, and passes nothing; so does what was not measured.
        """
        above = self.better == "less"
        if self.better == "one" and value is not None and value > 1:
            above, threshold = True, 1 / threshold
        passes = value is not None and (value <= threshold if above else value >= threshold)
        return None if passes else (threshold, above)

    def bounds(self, threshold: float) -> tuple[float | None, float | None]:
        """The least and the largest value that pass."""
        if self.better == "one":
            return threshold, 1 / threshold
        return (None, threshold) if self.better == "less" else (threshold, None)


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


def by_precision(*, int8: float, int4_weights: float, bf16: float, fp16: float, fp32: float) -> dict[Precision, float]:
    """Default thresholds. FP8 is held to INT8's, weights in INT8 to those of bf16.

    int8 and fp8: 8 dB less a step than the emoji example's worst task measures with every layer in INT8; networks of
    Stable Diffusion's size with random weights measure 20 dB and more. int8-weights: the example measures 35 dB at its
    worst call, close to bf16; int4-weights: 24 dB at its worst call, and in its worst task 16 dB of guidance, pictures
    of 30 dB, 29 dB outside a mask and a VIF of 0.61. bf16: 8 bits of mantissa give 38 to 40 dB a step; fp32: rounding
    order only. A mask cut off at half of its range, which in some networks no other metric sees, leaves 12.4 dB of
    guidance (``bench.defects``).
    """
    return {
        "int8": int8,
        "fp8": int8,
        "int4-weights": int4_weights,
        "int8-weights": bf16,
        "bf16": bf16,
        "fp16": fp16,
        "fp32": fp32,
    }


def less(amount: float) -> Callable[[float], float]:
    """A margin: so much below what was measured."""
    return lambda value: value - amount


def times_from_one(factor: float) -> Callable[[float], float]:
    """A margin: so many times as far from 1 as what was measured; a ratio above 1 counts as its inverse."""
    return lambda value: 1 - factor * (1 - (1 / value if value > 1 else value))


#: What is built without a margin of its own: 6 dB are twice the error, and ratios and cosines get three times the
#: distance from 1.
MARGINS: Mapping[str, Callable[[float], float]] = {
    "db": less(6.0),
    "ratio": times_from_one(3.0),
    "cosine": times_from_one(3.0),
}

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


def summarise(measured: TaskMetrics) -> dict[str, Any]:
    """Every figure at its place, spans as [least, largest]; groups without any number are ``None``."""
    summary: dict[str, Any] = {}
    for metric in METRICS:
        readings = metric.readings(measured)
        for figure in metric.figures:
            for key, value in _values(metric, figure, readings):
                _put(summary, key.split("."), list(value) if isinstance(value, tuple) else value)
    return {key: None if _is_empty(value) else value for key, value in summary.items()}


def _values(metric: Metric, figure: Figure, readings: Sequence[Reading]) -> Iterator[tuple[str, Value | None]]:
    if DIRECTION not in figure.key:
        yield figure.key, _picked(metric, figure, readings)
        return
    directions = dict.fromkeys(str(reading.direction) for reading in readings)
    if not directions:
        yield figure.key.split(f".{DIRECTION}")[0], None
    for direction in directions:
        of_direction = [reading for reading in readings if reading.direction == direction]
        yield figure.key.replace(DIRECTION, direction), _picked(metric, figure, of_direction)


def _picked(metric: Metric, figure: Figure, readings: Sequence[Reading]) -> Value | None:
    values = [reading.value for reading in readings if reading.value is not None]
    if not values:
        return None
    if figure.pick == "span":
        return min(values), max(values)
    return fmean(values) if figure.pick == "mean" else metric.worst_of(values)


def _put(group: dict[str, Any], place: Sequence[str], value: Any) -> None:
    for name in place[:-1]:
        group = group.setdefault(name, {})
    group[place[-1]] = value


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict) and all(entry is None for entry in value.values())


def absent_reasons(subject: Subject) -> tuple[dict[str, str], frozenset[str]]:
    """Why there is no figure: (its key, or its group's) → the reason; and the names of the metrics without a judgement.

    A metric that applies and was not measured for no such reason is left out, and so fails its threshold.
    """
    reasons, absent = {}, set()
    for metric in METRICS:
        if (reason := metric.absent(subject, metric.worst(subject.measured))) is not None:
            absent.add(metric.name)
            reasons[metric.figures[0].key.partition(".")[0]] = reason
    return reasons, frozenset(absent)


def measure_picture(
    trajectory: Trajectory, candidate: Result, task: Task, perceptual: Perceptual, fit: Fit = "crop"
) -> PictureMetrics:
    """Everything about one picture.

    Args:
        trajectory: what the float original did.
        candidate: what it made from the same noise, nothing pasted back.
        task: says which parts of the picture were to change.
        perceptual: the metrics that need torch.
        fit: how both fitted a picture of other proportions.

    Raises:
        AccuracyError: pictures or latents of different shapes, or not finite.
    """
    want, have = np.asarray(trajectory.picture), np.asarray(candidate.image)
    region, truth = changed_region(trajectory, task, fit), trajectory.target
    return PictureMetrics(
        {
            metric.name: metric.draw.measure(trajectory, candidate, perceptual)
            for metric in METRICS
            if isinstance(metric.draw, PerPicture)
        },
        region=None if region is None else region_metrics(region, want, have),
        truth=None if truth is None else truth_metrics(np.asarray(truth), want, have),
        clip=perceptual.clip and perceptual.clip(trajectory.picture, candidate.image, trajectory.prompt),
    )


def columns() -> dict[str, tuple[Figure, ...]]:
    """The columns of the command's table: heading → what stands in it."""
    shown: dict[str, tuple[Figure, ...]] = {}
    for figure in (figure for metric in METRICS for figure in metric.figures if figure.column):
        shown[figure.column] = (*shown.get(figure.column, ()), figure)
    return shown


def is_group(key: str) -> bool:
    """Whether figures lie below ``key`` in a summary, which is ``None`` where they do not apply."""
    return any(figure.key.startswith(f"{key}.") for metric in METRICS for figure in metric.figures)


def figure_of(key: str) -> tuple[Metric, Figure] | None:
    """The figure whose place in a summary is ``key``."""
    return next(
        ((metric, figure) for metric in METRICS for figure in metric.figures if figure.fits(key) is not None), None
    )
