"""What a report is made of: frozen dataclasses, pictures included, that know nothing of HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from calibration.shared_scales import SharedScale
from mtu_compile.accuracy.calls import StepMetrics
from mtu_compile.accuracy.thresholds import Thresholds
from mtu_compile.bundle import EngineRef, Manifest, TaskEntry
from mtu_compile.bundle.provenance import NoticeRecord, ParityRecord
from mtu_compile.bundle.quantisation import AlignmentRecord, CompressionRecord, MixedRecord, QuantisationRecord
from mtu_compile.core.routing import Routing

#: A threshold: least and largest value that pass, ``None`` where there is no such end.
Bounds = tuple[float | None, float | None]
Value = float | tuple[float, float]


@dataclass(frozen=True)
class MetricLine:
    """One line of a task's table of metrics.

    Attributes:
        key: where ``TaskCheck.summary`` says it, parts joined by dots.
        label: for people, without the unit.
        unit: ``"dB"`` or nothing.
        value: now measured: a number, or the least and the largest of several; ``None`` if it was not.
        recorded: the same as the manifest has it from the build.
        bounds: what passes; ``None`` where nothing was asked.
        reason: why there is no value.
    """

    key: str
    label: str
    unit: str
    value: Value | None
    recorded: Value | None = None
    bounds: Bounds | None = None
    reason: str | None = None

    @property
    def idle(self) -> bool:
        """Whether there is neither a value nor anything asked of it."""
        return self.value is None and self.bounds is None

    @property
    def passed(self) -> bool | None:
        """Whether it is within ``bounds``; ``None`` where nothing was asked."""
        if self.bounds is None:
            return None
        if self.value is None:
            return False
        least, largest = self.value if isinstance(self.value, tuple) else (self.value, self.value)
        low, high = self.bounds
        return (low is None or least >= low) and (high is None or largest <= high)


@dataclass(frozen=True)
class PicturePair:
    """A picture of the float original and the one the bundle's engines make from the same noise.

    Attributes:
        prompt, seed: what was asked for.
        source, mask, truth: of the task's condition, and the wanted picture, or ``None``.
        reference: the float original's, RGB.
        made: the bundle's, of the same size; nothing pasted back in either.
        metrics: label → number with its unit, of this picture.
        calls: the UNet calls that made it, compared with the float original's.
    """

    prompt: str
    seed: int
    source: Image.Image | None
    mask: Image.Image | None
    truth: Image.Image | None
    reference: Image.Image
    made: Image.Image
    metrics: Mapping[str, float | None]
    calls: tuple[StepMetrics, ...]


@dataclass(frozen=True)
class TaskReport:
    """One task.

    Attributes:
        entry: what the manifest says of it.
        metrics: measured now.
        thresholds: what was asked.
        failures: every missed threshold, in words.
        pictures: side by side.
        steps: denoising steps of each picture.
        producer: what made the float pictures.
        mixed: the per-layer search, or ``None`` where none ran.
    """

    entry: TaskEntry
    metrics: tuple[MetricLine, ...]
    thresholds: Thresholds
    failures: tuple[str, ...]
    pictures: tuple[PicturePair, ...]
    steps: int
    producer: str
    mixed: MixedRecord | None

    @property
    def name(self) -> str:
        return self.entry.task.name

    @property
    def quantisation(self) -> QuantisationRecord | None:
        """What quantising recorded, or ``None`` for a float task."""
        return self.entry.provenance.quantisation

    @property
    def compression(self) -> CompressionRecord | None:
        """What compressing its weights alone recorded, or ``None``."""
        return self.entry.provenance.compression

    @property
    def notices(self) -> Sequence[NoticeRecord]:
        """What there was to say of the rows the task was calibrated and checked with."""
        return self.entry.provenance.notices

    @property
    def parity(self) -> ParityRecord | None:
        """The table of backends of the build machine, or ``None``."""
        return self.entry.provenance.parity


@dataclass(frozen=True)
class Network:
    """One network of the bundle.

    Attributes:
        name: the task's, or the part's.
        engine: what the manifest says of it.
        files: that belong to it alone, relative to the bundle.
        bytes: of these, on disk.
        build_seconds: on the build machine; ``None`` if not recorded.
    """

    name: str
    engine: EngineRef
    files: tuple[str, ...]
    bytes: int
    build_seconds: float | None = None


@dataclass(frozen=True)
class Amount:
    """Bytes of one form of routing.

    Attributes:
        bytes: of it.
        kind: whether they were measured or are the planner's.
    """

    bytes: int
    kind: Literal["measured", "estimate"]


@dataclass(frozen=True)
class RoutingForms:
    """Both forms of routing for the tasks of one bundle; one of them is the bundle's.

    Attributes:
        memory: by form, on the device: UNets, the other parts and the workspace, all resident.
        disk: by form, of the UNets alone.
        recommended: the form that suits the device.
        reason: why, in words.
    """

    memory: Mapping[Routing, Amount]
    disk: Mapping[Routing, Amount]
    recommended: Routing | None
    reason: str | None


@dataclass(frozen=True)
class Fact:
    """Something one may want to know of the bundle, and where it was measured, if it was.

    Attributes:
        what: is asked.
        how: on what it was measured, by what it was estimated, or why it was not.
        kind: ``"measured"``, ``"estimate"`` or ``"not measured"``.
    """

    what: str
    how: str
    kind: str


@dataclass(frozen=True)
class Report:
    """Everything a report shows.

    Attributes:
        path: the bundle's folder.
        manifest: what it says of itself.
        made_at: date and time, UTC, ISO 8601.
        made_by: version of mtu-compile.
        machine: the processor everything was measured on.
        measured_with: what the networks ran on.
        device: of the target, in its vendor's words.
        device_here: whether that is in this machine.
        tasks: in the manifest's order.
        networks: in the manifest's order.
        other_files: kind of file → bytes on disk, of what belongs to no network.
        ranges: layers whose INT8 ranges two or more tasks recorded, those that differ most first.
        facts: what was measured, where, and what was not.
        commands: what made the bundle and the report, (what for, as typed).
        forms: one engine for all tasks against one for each; ``None`` for a single task, and where nothing is known.
    """

    path: Path
    manifest: Manifest
    made_at: str
    made_by: str
    machine: str
    measured_with: str
    device: str
    device_here: bool
    tasks: tuple[TaskReport, ...]
    networks: tuple[Network, ...]
    other_files: Mapping[str, int]
    ranges: tuple[SharedScale, ...]
    facts: tuple[Fact, ...]
    commands: tuple[tuple[str, str], ...]
    forms: RoutingForms | None = None

    @property
    def passed(self) -> bool:
        """Whether every task meets its thresholds."""
        return not any(task.failures for task in self.tasks)

    @property
    def alignment(self) -> AlignmentRecord | None:
        """How the ranges of tasks that share an engine were aligned; ``None`` where they were not."""
        found = (task.quantisation.alignment for task in self.tasks if task.quantisation is not None)
        return next((one for one in found if one is not None), None)

    @property
    def bytes(self) -> int:
        """Of the whole bundle on disk, without its manifest."""
        return sum(one.bytes for one in self.networks) + sum(self.other_files.values())

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures, as plain JSON data."""
        return {"passed": self.passed, "bytes": self.bytes, **_plain(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Manifest):
        return value.to_json()
    if isinstance(value, TaskEntry):
        return value.task.name
    if isinstance(value, Thresholds):
        return value.to_json()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        kept = (f.name for f in fields(value) if not isinstance(getattr(value, f.name), Image.Image))
        return {name: _plain(getattr(value, name)) for name in kept}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not isfinite(value):
        return str(value)  # as the manifest writes it
    return value
