"""What a manifest tells people and reports: how a bundle was made and compared, and what it would need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mtu_compile.bundle.kinds import Bytes, Cosine, Count, Decibels, Magnitude, Name, Positive, Ratio, Seconds, Text
from mtu_compile.bundle.plan import PlanRecord
from mtu_compile.bundle.quantisation import CalibrationRecord, CompressionRecord, DecoderRecord, QuantisationRecord
from mtu_compile.bundle.requirements import BoardRequirements
from mtu_compile.bundle.step_cache import StepCacheRecord
from mtu_compile.core.precision import Precision


@dataclass(frozen=True)
class ParityRow:
    """``mtu_compile.accuracy.host.parity.BackendResult``: one backend of the build machine over some UNet calls."""

    backend: Text
    version: Text
    worst_sqnr_db: Decibels
    mean_sqnr_db: Decibels
    worst_cosine: Cosine
    worst_guidance_ratio: Ratio | None
    agreement_db: Decibels | None
    judged: bool = True


@dataclass(frozen=True)
class ParityRecord:
    """``mtu_compile.accuracy.host.parity.Parity``: one graph on every backend of the build machine."""

    calls: Positive
    rows: tuple[ParityRow, ...]
    not_run: Mapping[str, Text]
    required_db: Decibels
    failures: tuple[Text, ...]
    task: Text | None = None
    graph: Text | None = None
    reference: Text | None = None


@dataclass(frozen=True)
class NoticeRecord:
    """``calibration.notices.RowNotice``: a row of the data that may not be as meant.

    Attributes:
        use: what the row is used for.
        row: its place in the data folder.
        kind: of the notice.
        message, hint: for people.
        prompt, tokens, limit, dropped: of a prompt that is cut.
        pixels, of: of a mask that selects little.
    """

    use: Literal["calibration", "check"]
    row: Text
    kind: Name
    message: Text
    hint: Text
    prompt: Text | None = None
    tokens: Count | None = None
    limit: Count | None = None
    dropped: Text | None = None
    pixels: Count | None = None
    of: Count | None = None


@dataclass(frozen=True)
class HalfRangeRecord:
    """``mtu_compile.accuracy.host.half_range.HalfRange``: how far the numbers go of a network that is half precision.

    Attributes:
        peak: largest magnitude.
        node: where it is.
        precision: what the network is built in, where that was chosen by it.
        overflow, overflow_type, overflow_at: first node beyond float16, its operator, and the input it was seen on.
    """

    peak: Magnitude
    node: Text
    precision: Precision | None = None
    overflow: Text | None = None
    overflow_type: Text | None = None
    overflow_at: Count | None = None


@dataclass(frozen=True)
class StepRecord:
    """``mtu_compile.steps.Ran``: one step of the build.

    Attributes:
        step: its name.
        title: what it was for.
        cached: its result had been kept by an earlier build.
        seconds: what making the result took, then or in this build.
    """

    step: Text
    title: Text
    cached: bool
    seconds: Seconds


@dataclass(frozen=True)
class TaskProvenance:
    """How a task's UNet was made: ``None`` for what was not done.

    Attributes:
        notices: rows of the data that may not be as meant.
        calibration: what it was quantised with.
        quantisation: how.
        compression: how its weights were compressed without calibration.
        build_seconds: what building the engine took.
        parity: its graph on every backend of the build machine.
        float16_range: how far its numbers go, where they could be too far for float16.
        step_cache: how it came to need fewer whole UNet calls, or why it does not.
    """

    notices: tuple[NoticeRecord, ...] = ()
    calibration: CalibrationRecord | None = None
    quantisation: QuantisationRecord | None = None
    compression: CompressionRecord | None = None
    build_seconds: Seconds | None = None
    parity: ParityRecord | None = None
    float16_range: HalfRangeRecord | None = None
    step_cache: StepCacheRecord | None = None


@dataclass(frozen=True)
class BuildProvenance:
    """How a bundle was made.

    Attributes:
        plan: the memory it was expected to need.
        board: what a board has to have that builds its engines.
        as_task: the task that a plain pipeline was taken as.
        float16_range: by part, how far its numbers go, where they could be too far for float16.
        shared_weights_saved_bytes: how much smaller the bundle is because its UNets keep in one file what their weights
            have in common; ``None`` where each has a file of its own.
        steps: what was run for it, and what was taken from the cache.
        decoder: how the VAE decoder was quantised; ``None`` where it is float.
    """

    plan: PlanRecord | None = None
    board: BoardRequirements | None = None
    as_task: Name | None = None
    float16_range: Mapping[str, HalfRangeRecord] = field(default_factory=dict)
    shared_weights_saved_bytes: Bytes | None = None
    steps: tuple[StepRecord, ...] = ()
    decoder: DecoderRecord | None = None
