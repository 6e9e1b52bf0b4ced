"""What passes between the stages of a compilation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import passes
from calibration.notices import RowNotice
from calibration.quantize import QuantSettings
from calibration.sets import CalibrationSet
from mtu_compile import bundle
from mtu_compile.accuracy.verdict import CheckResult
from mtu_compile.core.fit import Fit
from mtu_compile.core.progress import Progress
from mtu_compile.core.tasks import Task
from targets.base import Precision, Target

Gate = Literal["off", "warn", "fail"]

#: What a manifest says of a calibration set that the build captured itself; else it is the name of a folder of sets.
CAPTURED = "captured by this build"


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        model: MTU pipeline folder, or a plain one with ``as_task``.
        output: bundle folder to write.
        target: name of a target (``mtu-compile targets``).
        precision: one of the target's.
        tasks: names of the tasks to build, or ``None`` for all.
        as_task: compile a plain diffusers pipeline as this one task (``mtu_compile.model.plain.AS_TASKS``).
        size: height and width of the pictures in pixels, or ``None`` for the model's own.
        data: folder with prompts and pictures to calibrate and check with, or ``None`` for the model's ``samples/``.
        calibration: folder of calibration sets (``mtu-compile calibrate``) to quantise with, or ``None`` to capture
            the inputs of the model on ``data``.
        quant_config: a bundle or a JSON file that says how each task is quantised, or ``None`` to find out.
        mixed: keep layers float where the device runs INT8 slower, or where accuracy needs it.
        sampler: of calibration, check, and the bundle's default; ``None`` for the model's own.
        steps: denoising steps of calibration, check, and the bundle's default.
        fit: what becomes of pictures of other proportions in calibration and check, and in the bundle unless its user
            says otherwise.
        calibration_pictures: trajectories calibrated with, per task.
        check_pictures: trajectories the bundle is checked with, per task.
        gate: what a task below its threshold does: ``"fail"`` raises, ``"warn"`` only records.
        memory: bytes the device has, or the machine whose memory it shares; asked of the target if not given.
        build_memory: bytes the build may use of this machine; all there are if not given.
        seed: of everything random.
        fetch_wheels: put the packages a board needs into its bundle, for boards without internet.
        force: replace an existing output.
    """

    model: Path
    output: Path
    target: str = "cpu"
    precision: Precision = "int8"
    tasks: tuple[str, ...] | None = None
    as_task: str | None = None
    size: tuple[int, int] | None = None
    data: Path | None = None
    calibration: Path | None = None
    quant_config: Path | None = None
    mixed: bool = True
    sampler: str | None = None
    steps: int = 20
    fit: Fit = "crop"
    calibration_pictures: int = 12
    check_pictures: int = 4
    gate: Gate = "fail"
    memory: int | None = None
    build_memory: int | None = None
    seed: int = 0
    fetch_wheels: bool = True
    force: bool = False


@dataclass(frozen=True)
class BuildResult:
    """Where the bundle is, what is in it, and how accurate it is (``None`` where the gate is off)."""

    path: Path
    manifest: bundle.Manifest
    check: CheckResult | None


@dataclass(frozen=True)
class Job:
    """What every stage needs to know.

    Attributes:
        staging: folder that becomes the bundle.
        work: folder for what the bundle does not carry.
        source: the model's name and hash.
        size: height and width of the pictures in pixels.
        settings: by task, the quantisation that was given; empty where it is to be chosen.
        notices: by task, what there is to say of its rows.
        sets: by task, the calibration sets that were given; empty where they are to be captured.
    """

    options: BuildOptions
    target: Target
    staging: Path
    work: Path
    source: bundle.Source
    size: tuple[int, int]
    progress: Progress
    sets: Mapping[str, CalibrationSet] = field(default_factory=dict)
    settings: Mapping[str, QuantSettings] = field(default_factory=dict)
    notices: Mapping[str, tuple[RowNotice, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Specialised:
    """One task's static float graph.

    Attributes:
        task_id: index of the task in the model.
        task: its description.
        graph: ONNX file.
        passes: what the passes did to it.
    """

    task_id: int
    task: Task
    graph: Path
    passes: tuple[bundle.PassRecord, ...]


def pass_records(done: Sequence[passes.PassResult]) -> tuple[bundle.PassRecord, ...]:
    """Only what a manifest keeps: a result holds the graph."""
    return tuple(bundle.PassRecord(one.id, one.changed, one.rewrites) for one in done)


@dataclass(frozen=True)
class Graphs:
    """Every network of a model as float ONNX: what a device has to hold.

    Attributes:
        dynamic: the UNet with the task as an input.
        tasks: by name, the UNet specialised to a task.
        parts: ``text_encoder``, ``vae_encoder``, ``vae_decoder``.
    """

    dynamic: Path
    tasks: Mapping[str, Specialised]
    parts: Mapping[str, Path]

    @property
    def unets(self) -> dict[str, Path]:
        """By task, its graph."""
        return {name: one.graph for name, one in self.tasks.items()}


@dataclass(frozen=True)
class Observed:
    """What the float original did on real inputs of one task.

    Attributes:
        calibration: UNet inputs, or ``None`` where nothing is quantised.
        reference: file of the float reference, in the bundle.
    """

    calibration: CalibrationSet | None
    reference: Path
