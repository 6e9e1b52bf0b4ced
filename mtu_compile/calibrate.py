"""Calibration sets from a user's own prompts and pictures, and what they say about one scale for all tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from calibration.capture import CALLS
from calibration.notices import RowNotice
from calibration.ranges import ActivationRange, measure_ranges
from calibration.set_folder import INDEX, write_folder
from calibration.sets import CalibrationSet
from calibration.shared_scales import to_json
from mtu_compile.core.atomic import staging
from mtu_compile.core.fit import Fit
from mtu_compile.core.progress import Progress
from mtu_compile.core.seeds import check_seed
from mtu_compile.model.sampler import check_sampler
from mtu_compile.stages import load
from mtu_compile.stages.export import exported_unet
from mtu_compile.stages.job import Drawing, Rows, Workload
from mtu_compile.stages.observe import captured
from mtu_compile.stages.opened import let_go
from mtu_compile.stages.precision import INT8
from mtu_compile.stages.running import running
from mtu_compile.stages.specialise import specialise

__all__ = ["CalibrateOptions", "CalibrateResult", "calibrate"]


@dataclass(frozen=True)
class CalibrateOptions:
    """What to calibrate with.

    Attributes:
        model: MTU pipeline folder.
        output: folder of calibration sets to write.
        data: folder with prompts and pictures, or ``None`` for the model's ``samples/``.
        tasks: names of the tasks, or ``None`` for all.
        as_task: take a plain diffusers pipeline as this one task, as ``BuildOptions.as_task``.
        size: height and width of the pictures in pixels, or ``None`` for the model's own.
        pictures: trajectories, per task.
        sampler: whose trajectories, ``None`` for the model's own.
        steps: denoising steps.
        calls: UNet calls kept of each trajectory.
        fit: what becomes of pictures of other proportions.
        seed: of the noise, as ``BuildOptions.seed``.
        ranges: measure activation ranges, and compare them between the tasks.
        force: replace an existing output.
        cache: as ``BuildOptions.cache``.
    """

    model: Path
    output: Path
    data: Path | None = None
    tasks: tuple[str, ...] | None = None
    as_task: str | None = None
    size: tuple[int, int] | None = None
    pictures: int = Workload.calibration_pictures
    sampler: str | None = None
    steps: int = Workload.steps
    calls: int = CALLS
    fit: Fit = "crop"
    seed: int = 0
    ranges: bool = True
    force: bool = False
    cache: Path | None = None


@dataclass(frozen=True)
class CalibrateResult:
    """What was made.

    Attributes:
        path: the folder.
        sets: its sets, by task.
        ranges: by task and layer the range of activations; ``None`` where it was not measured.
        notices: by task, what there is to say of its rows.
    """

    path: Path
    sets: Mapping[str, CalibrationSet]
    ranges: Mapping[str, Mapping[str, ActivationRange]] | None
    notices: Mapping[str, tuple[RowNotice, ...]] = field(default_factory=dict)


def calibrate(options: CalibrateOptions, progress: Progress | None = None) -> CalibrateResult:
    """Capture a calibration set for each task, and write them as one folder.

    A build with the same model, data and settings captures the very same sets; rows kept for checks are not used. Equal
    calls write equal bytes on the same machine with as many threads: torch adds up in another order with others.

    Raises:
        ConfigError: an unknown task, a size the model cannot make, or an output that exists.
        ModelError: a model folder that is damaged or not multi-task.
        CalibrationError, InputError: data that cannot be used. Nothing is left at ``options.output``.
    """
    progress = progress or Progress()
    check_seed(options.seed)
    load.check_model(options)
    check_sampler(options.model, options.sampler, options.steps)
    with (
        staging(options.output, replace=options.force, marker=INDEX) as folder,
        running(options.cache, folder.parent, progress) as steps,
    ):
        with progress.stage("load"):
            model = load.load_model(options, sampler=options.sampler)
            rows = load.load_rows(options.model, options.data, model.tasks, calibrating=options.pictures, checking=1)
            rows = {name: Rows(used.calibrating) for name, used in rows.items()}
        notices = load.note_rows(model, rows, options.fit, progress)
        sets, drawing = {}, Drawing(options.steps, options.seed, options.fit, options.sampler)
        for task in model.tasks:
            whose, used = (model.checkpoint, task.name), rows[task.name].calibrating
            made = captured.of(f"calibrate {task.name}", *whose, used, model.size, drawing, options.calls)
            sets[task.name] = CalibrationSet.load(steps.run(made))
        measured = None
        if options.ranges:
            dynamic = steps.run(exported_unet.of("export the UNet", model.checkpoint))
            unets = specialise(steps, dynamic, model)
            del model
            let_go()
            measured = _measure({name: steps.intact(unet.graph) for name, unet in unets.items()}, sets, progress)
        write_folder(folder, sets, None if measured is None else to_json(measured))
    return CalibrateResult(options.output, sets, measured, notices)


def _measure(
    graphs: Mapping[str, Path], sets: Mapping[str, CalibrationSet], progress: Progress
) -> dict[str, dict[str, ActivationRange]]:
    measured = {}
    for task, graph in graphs.items():
        with progress.stage(f"ranges {task}", len(sets[task].inputs)) as advance:
            measured[task] = measure_ranges(
                graph, sets[task].inputs, ignored_scopes=INT8.ignored_scopes, progress=advance
            )
    return measured
