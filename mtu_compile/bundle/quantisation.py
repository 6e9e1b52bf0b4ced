"""How a task's UNet was calibrated, quantised or compressed, as the manifest keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mtu_compile.bundle.kinds import (
    Bytes,
    Count,
    Decibels,
    Magnitude,
    Milliseconds,
    Name,
    Positive,
    Ratio,
    Seed,
    Sha256,
    Share,
    Steps,
    Text,
    Timestep,
)


@dataclass(frozen=True)
class CalibrationRecord:
    """The inputs a UNet was quantised with: ``calibration.sets.CalibrationSet.describe``.

    Attributes:
        sha256: of the set.
        strategy: which calls of a trajectory it keeps.
        pictures: trajectories.
        calls: UNet calls in all.
        steps: denoising steps of a trajectory.
        seed: of the first trajectory's noise.
        timesteps: that it meets.
        source: ``mtu_compile.stages.job.CAPTURED``, or the name of the folder it was given as.
    """

    sha256: Sha256 | None = None
    strategy: Name | None = None
    pictures: Positive | None = None
    calls: Positive | None = None
    steps: Steps | None = None
    seed: Seed | None = None
    timesteps: tuple[Timestep, ...] = ()
    source: Text | None = None


@dataclass(frozen=True)
class SettingsRecord:
    """``calibration.quant_settings.QuantSettings``."""

    subset_size: Positive | None
    smooth_quant_alpha: Share | None
    range_estimator: Name
    weight_bits_fix: bool
    fast_bias_correction: bool
    ignored_scopes: tuple[Text, ...]


@dataclass(frozen=True)
class CriteriaRecord:
    """``calibration.mixed.Criteria``: what the choice of layers had to keep."""

    sqnr_db: Decibels
    guidance_ratio: Share
    slowdown: Share


Why = Literal["accuracy", "slower"]


@dataclass(frozen=True)
class LayerRecord:
    """One unit of layers that are quantised together.

    Attributes:
        name, members, op: see ``calibration.layer_groups.LayerGroup``.
        sqnr_db, worst_sqnr_db: of the UNet's output when only these are INT8: pooled over the calls, the worst call.
        guidance_db: of the guidance delta, pooled, in the worst direction; ``None`` without guidance.
        float_ms, int8_ms: what they cost on the device, ``None`` where nothing is known.
        kept: why they stay float, or ``None`` where they are INT8.
        measured: whether their errors were measured by a run with only these in INT8, or estimated to the first order.
    """

    name: Text
    members: tuple[Text, ...]
    op: Name
    sqnr_db: Decibels
    worst_sqnr_db: Decibels
    guidance_db: Decibels | None
    float_ms: Milliseconds | None
    int8_ms: Milliseconds | None
    kept: Why | None
    measured: bool = True

    @property
    def gain_ms(self) -> float | None:
        """Milliseconds that INT8 saves."""
        return None if self.float_ms is None or self.int8_ms is None else self.float_ms - self.int8_ms


@dataclass(frozen=True)
class CostsRecord:
    """Where the times of layers come from, and whether they were measured on the device."""

    source: Text
    measured: bool


@dataclass(frozen=True)
class ReachedRecord:
    """How accurate a choice of layers is over the UNet calls it was run on."""

    worst_sqnr_db: Decibels
    mean_sqnr_db: Decibels
    guidance_ratio: tuple[Ratio, Ratio] | None


@dataclass(frozen=True)
class MixedRecord:
    """What a search for the layers that stay float chose, and everything it was chosen by (``calibration.mixed``).

    Where tasks share a UNet, one choice was made for all, and each has a record of its own: what was measured is its.

    Attributes:
        criteria: what had to be met.
        met: whether the choice, run as a whole, meets them in this task.
        calls: UNet calls of this task that each layer's error was estimated or measured on.
        check_calls: UNet calls of this task that the whole was run on.
        layers: every unit, in graph order.
        costs: where the times come from.
        all_int8, chosen: accuracy of this task with everything in INT8, and of the choice.
        chosen_for: names of the tasks that it was chosen for, if there is more than one: what keeps a layer float may
            be the error it has in another task.
    """

    criteria: CriteriaRecord
    met: bool
    calls: Positive
    check_calls: Positive
    layers: tuple[LayerRecord, ...]
    costs: CostsRecord | None
    all_int8: ReachedRecord
    chosen: ReachedRecord
    chosen_for: tuple[Name, ...] = ()

    @property
    def float_layers(self) -> tuple[str, ...]:
        """Node names of the layers that stay float."""
        return tuple(name for layer in self.layers if layer.kept for name in layer.members)

    @property
    def kept(self) -> tuple[LayerRecord, ...]:
        """The layers that stay float, most sensitive first."""
        return tuple(sorted((layer for layer in self.layers if layer.kept), key=lambda layer: layer.sqnr_db))


@dataclass(frozen=True)
class Fp8Record:
    """``calibration.fp8.Fp8Report``: what became of the INT8 graph in FP8."""

    activations: Count
    weights: Count
    layers: Mapping[str, tuple[Count, Count]]
    dropped: Count
    bytes_before: Bytes
    bytes_after: Bytes


@dataclass(frozen=True)
class AlignSettingsRecord:
    """``calibration.aligning.AlignSettings``."""

    limit_bits: Ratio
    powers_of_two: bool


@dataclass(frozen=True)
class AlignedLayerRecord:
    """``calibration.aligning.AlignedLayer``, by task."""

    factors: Mapping[str, Ratio]
    before: Mapping[str, Ratio]
    after: Mapping[str, Ratio]


@dataclass(frozen=True)
class AlignmentRecord:
    """``calibration.aligning.AlignReport``: factors that let all tasks use the range of one scale."""

    settings: AlignSettingsRecord
    layers: Mapping[str, AlignedLayerRecord]
    left: Mapping[str, Text]
    measured: Count
    worst_before: Mapping[str, Ratio]
    worst_after: Mapping[str, Ratio]


@dataclass(frozen=True)
class QuantisationRecord:
    """``calibration.quantize.QuantisationReport``, and what is known beside it.

    Attributes:
        settings: what was asked for.
        samples: calibration samples used.
        samples_by_task: how many of them are of which task, where tasks share the UNet.
        activations, weights: quantised ones.
        layers: by operation type, how many run in INT8 and how many there are.
        float_layers: layers that stayed float, in graph order.
        bytes_before, bytes_after: graph and weights on disk.
        tool: what quantised it.
        ranges: by layer, the largest activation its INT8 holds.
        mixed: the search for layers that stay float, where one ran.
        config: name of the bundle or file the settings were taken from.
        fp8: what became of it in FP8.
        alignment: how the ranges of its tasks were aligned, of a graph that serves several.
    """

    settings: SettingsRecord | None = None
    samples: Positive | None = None
    activations: Count | None = None
    weights: Count | None = None
    layers: Mapping[str, tuple[Count, Count]] = field(default_factory=dict)
    float_layers: tuple[Text, ...] = ()
    bytes_before: Bytes | None = None
    bytes_after: Bytes | None = None
    tool: Text | None = None
    ranges: Mapping[str, Magnitude] = field(default_factory=dict)
    mixed: MixedRecord | None = None
    config: Text | None = None
    fp8: Fp8Record | None = None
    samples_by_task: Mapping[str, Count] = field(default_factory=dict)
    alignment: AlignmentRecord | None = None


@dataclass(frozen=True)
class DecoderRecord:
    """The VAE decoder in INT8: how it was quantised, and its pictures against the float decoder's.

    Attributes:
        quantisation: how.
        pictures: how many were compared, of other rows than it was quantised with.
        worst_psnr_db, mean_psnr_db: of them, both decoded from the float original's latents.
    """

    quantisation: QuantisationRecord
    pictures: Positive
    worst_psnr_db: Decibels
    mean_psnr_db: Decibels


@dataclass(frozen=True)
class CompressSettingsRecord:
    """``calibration.compress.CompressSettings``; ``ratio`` and ``group_size`` are those of INT4."""

    mode: Name
    ignored_scopes: tuple[Text, ...] = ()
    ratio: Share | None = None
    group_size: Count | None = None


@dataclass(frozen=True)
class CompressionRecord:
    """``calibration.compress.CompressionReport``: weights that were compressed without calibration."""

    layers: Mapping[str, Mapping[str, Count]]
    bytes_before: Bytes
    bytes_after: Bytes
    tool: Text
    settings: CompressSettingsRecord | None = None
    parameters: Mapping[str, Bytes] = field(default_factory=dict)
    rounded_again: Count = 0
