"""What an entry of the table of metrics consists of (``mtu_compile.accuracy.metrics``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mtu_compile.accuracy.calls import distance
from mtu_compile.accuracy.pictures import Perceptual
from mtu_compile.accuracy.readings import Draw, PerCall, PerDelta, Reading
from mtu_compile.accuracy.task_metrics import TaskMetrics
from mtu_compile.bundle.units import Unit, last_word, unit_of
from mtu_compile.core.precision import Precision
from mtu_compile.core.tasks import Task

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
