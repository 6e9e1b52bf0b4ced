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
from mtu_compile.core.tasks import Task
from mtu_compile.stages.job import Drawing, Model, Observed, Rows


def observe(
    model: Model,
    rows: Mapping[str, Rows],
    drawing: Drawing,
    sets: Mapping[str, CalibrationSet],
    model_sha256: str,
    references: Path,
    progress: Progress,
    *,
    quantised: bool,
) -> dict[str, Observed]:
    """By task, the inputs to quantise it with, and the float reference it is checked against.

    Args:
        rows: by task, its rows.
        sets: by task, the calibration sets that were given.
        references: folder of the references.
        quantised: capture a set for each task without one.

    Raises:
        CalibrationError: inputs that come from no denoising trajectory.
    """
    observed = {}
    for task in model.tasks:
        captured, used = sets.get(task.name), rows[task.name]
        if captured is None and quantised:
            captured = capture_set(model, task, used.calibrating, drawing, model_sha256, progress)
        reference = record(model, task, used.checking, drawing, references, progress)
        observed[task.name] = Observed(captured, reference)
    return observed


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
