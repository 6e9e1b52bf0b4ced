"""Calibration sets from a user's own prompts and pictures, and what they say about one scale for all tasks."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import targets
from calibration.capture import CALLS, capture
from calibration.notices import RowNotice
from calibration.ranges import Range, measure_ranges, to_json
from calibration.samples import split_samples
from calibration.set_folder import INDEX, write_folder
from calibration.sets import CalibrationSet
from mtu_compile import bundle
from mtu_compile.compile import SAMPLES, check_model, export_graphs, load_model, note_rows, select_tasks
from mtu_compile.core.atomic import staging
from mtu_compile.core.fit import Fit
from mtu_compile.core.hashing import model_sha256
from mtu_compile.core.progress import Progress
from mtu_compile.core.seeds import check_seed
from mtu_compile.core.tasks import Task
from mtu_compile.model.sampler import check_sampler, use_sampler
from mtu_compile.stages.job import BuildOptions, Job
from mtu_compile.stages.precision import INT8

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

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
    """

    model: Path
    output: Path
    data: Path | None = None
    tasks: tuple[str, ...] | None = None
    as_task: str | None = None
    size: tuple[int, int] | None = None
    pictures: int = 12
    sampler: str | None = None
    steps: int = 20
    calls: int = CALLS
    fit: Fit = "crop"
    seed: int = 0
    ranges: bool = True
    force: bool = False


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
    ranges: Mapping[str, Mapping[str, Range]] | None
    notices: Mapping[str, tuple[RowNotice, ...]] = field(default_factory=dict)


def calibrate(options: CalibrateOptions, progress: Progress | None = None) -> CalibrateResult:
    """Capture a calibration set for each task, and write them as one folder.

    A build with the same model, data and settings captures the very same sets; rows kept for checks are not used. Equal
    calls write equal bytes on the same machine with as many threads: torch adds up in another order with others.

    Raises:
        ConfigError: an unknown task, a size the model can not make, or an output that exists.
        ModelError: a model folder that is damaged or not multi-task.
        CalibrationError, InputError: data that can not be used. Nothing is left at ``options.output``.
    """
    progress = progress or Progress()
    check_seed(options.seed)
    check_model(options.model, options.as_task)
    check_sampler(options.model, options.sampler, options.steps)
    with staging(options.output, replace=options.force, marker=INDEX) as folder:
        with progress.stage("load"):
            sha256 = model_sha256(options.model)
            pipeline = load_model(options.model, options.as_task)
            use_sampler(pipeline, options.sampler)
            tasks = select_tasks(pipeline, options.tasks)
            size = pipeline.resolve_size(*(options.size or (None, None)))
            place = options.data or options.model / SAMPLES
            rows = [split_samples(place, task, calibrating=options.pictures, checking=1)[0] for _, task in tasks]
        notices = {
            task.name: note_rows(pipeline, (samples, ()), size, options.fit, progress)
            for (_, task), samples in zip(tasks, rows, strict=True)
        }
        sets = {}
        for (_, task), samples in zip(tasks, rows, strict=True):
            with progress.stage(f"calibrate {task.name}", len(samples)) as advance:
                made = capture(
                    pipeline,
                    task,
                    samples,
                    model_sha256=sha256,
                    steps=options.steps,
                    size=size,
                    seed=options.seed,
                    fit=options.fit,
                    calls=options.calls,
                    progress=advance,
                )
                made.verify(task=task.name, model_sha256=sha256)
                sets[task.name] = made
        measured = None
        if options.ranges:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.work-") as work:
                graphs = _graphs(options, pipeline, tasks, size, Path(work), progress)
                del pipeline
                gc.collect()
                measured = _measure(graphs, sets, progress)
        write_folder(folder, sets, None if measured is None else to_json(measured))
    return CalibrateResult(options.output, sets, measured, notices)


def _graphs(
    options: CalibrateOptions,
    pipeline: MTUPipeline,
    tasks: Sequence[tuple[int, Task]],
    size: tuple[int, int],
    work: Path,
    progress: Progress,
) -> dict[str, Path]:
    """By task, the static float graph that a build quantises: the same for all targets."""
    building = BuildOptions(options.model, options.output, size=size)
    source = bundle.Source(options.model.name, "")
    job = Job(building, targets.get(building.target), work, work, source, size, progress)
    return export_graphs(job, pipeline, tasks).unets


def _measure(
    graphs: Mapping[str, Path], sets: Mapping[str, CalibrationSet], progress: Progress
) -> dict[str, dict[str, Range]]:
    measured = {}
    for task, graph in graphs.items():
        with progress.stage(f"ranges {task}", len(sets[task].inputs)) as advance:
            measured[task] = measure_ranges(
                graph, sets[task].inputs, ignored_scopes=INT8.ignored_scopes, progress=advance
            )
        shutil.rmtree(graph.parent)  # graphs are as large as the model
    return measured
