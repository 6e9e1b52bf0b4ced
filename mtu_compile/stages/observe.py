"""What the float original does on real inputs: the UNet inputs to quantise with, and the answers to check against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from calibration.capture import CALLS, capture
from calibration.record import record_reference
from calibration.samples import Sample
from calibration.sets import CalibrationSet
from mtu_compile.core.progress import Progress
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.stages.job import Checkpoint, Drawing, Model, Observed, Rows
from mtu_compile.stages.opened import open_pipeline
from mtu_compile.steps import Call, Steps, Work, step

#: What makes the original's pictures.
TOOLS = ("torch", "diffusers", "transformers", "tokenizers", "numpy", "pillow")


def observe(
    steps: Steps,
    model: Model,
    rows: Mapping[str, Rows],
    drawing: Drawing,
    sets: Mapping[str, Path],
    *,
    quantised: bool,
) -> dict[str, Observed]:
    """By task, the inputs to quantise it with, and the float reference it is checked against.

    Args:
        rows: by task, its rows.
        sets: by task, files of the calibration sets that were given.
        quantised: capture a set for each task without one.

    Raises:
        CalibrationError: inputs that come from no denoising trajectory.
    """
    made: dict[tuple[str, str], Call[Path]] = {}
    for task in model.tasks:
        whose, used = (model.checkpoint, task.name), rows[task.name]
        if quantised and task.name not in sets:
            made["calibrate", task.name] = captured.of(
                f"calibrate {task.name}", *whose, used.calibrating, model.size, drawing
            )
        made["reference", task.name] = recorded.of(f"reference {task.name}", *whose, used.checking, model.size, drawing)
    files = dict(zip(made, steps.run_all(list(made.values())), strict=True))
    return {
        task.name: Observed(files.get(("calibrate", task.name), sets.get(task.name)), files["reference", task.name])
        for task in model.tasks
    }


@step(tools=TOOLS, cpu=True)
def captured(
    work: Work,
    checkpoint: Checkpoint,
    task: str,
    rows: tuple[Sample, ...],
    size: tuple[int, int],
    drawing: Drawing,
    calls: int = CALLS,
) -> Path:
    """``capture_set`` of a checkpoint's task, as a file."""
    model = _model(checkpoint, size, drawing)
    found = find_task(model.tasks, task)[1]
    path = work.folder / f"{task}.safetensors"
    capture_set(model, found, rows, drawing, checkpoint.sha256, work.progress, calls=calls).save(path)
    return path


@step(tools=TOOLS, cpu=True)
def recorded(
    work: Work, checkpoint: Checkpoint, task: str, rows: tuple[Sample, ...], size: tuple[int, int], drawing: Drawing
) -> Path:
    """``record`` of a checkpoint's task."""
    model = _model(checkpoint, size, drawing)
    return record(model, find_task(model.tasks, task)[1], rows, drawing, work.folder, work.progress)


def _model(checkpoint: Checkpoint, size: tuple[int, int], drawing: Drawing) -> Model:
    pipeline = open_pipeline(checkpoint, drawing.sampler)
    return Model(checkpoint, pipeline, tuple(pipeline.unet.tasks), size)


def capture_set(
    model: Model,
    task: Task,
    rows: Sequence[Sample],
    drawing: Drawing,
    model_sha256: str,
    progress: Progress,
    *,
    calls: int = CALLS,
) -> CalibrationSet:
    """What the UNet sees while it makes the pictures of ``rows``, ``calls`` UNet calls of each.

    Raises:
        CalibrationError: no rows, or inputs that come from no denoising trajectory.
    """
    with progress.stage(f"calibrate {task.name}", len(rows)) as advance:
        captured = capture(
            model.pipeline,
            task,
            rows,
            model_sha256=model_sha256,
            steps=drawing.steps,
            size=model.size,
            seed=drawing.seed,
            fit=drawing.fit,
            calls=calls,
            progress=advance,
        )
        captured.verify(task=task.name, model_sha256=model_sha256)
    return captured


def record(
    model: Model, task: Task, rows: Sequence[Sample], drawing: Drawing, folder: Path, progress: Progress
) -> Path:
    """The float reference of ``rows``, as a file of ``folder``, which is made if need be."""
    with progress.stage(f"reference {task.name}", len(rows)) as advance:
        recorded = record_reference(
            model.pipeline,
            task,
            rows,
            size=model.size,
            steps=drawing.steps,
            seed=drawing.seed,
            fit=drawing.fit,
            producer=f"torch {version('torch')}, float32, dynamic routing",
            progress=advance,
        )
        reference = folder / f"{task.name}.safetensors"
        folder.mkdir(exist_ok=True)
        recorded.save(reference)
    return reference
