"""Is a bundle as good as the float original? Engines are compared with the reference the bundle carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import targets
from mtu_compile import bundle, runtime
from mtu_compile.compare import compare_recorded
from mtu_compile.core.errors import BundleError
from mtu_compile.core.progress import Advance, Progress
from mtu_compile.metrics import TaskMetrics, image_metrics, psnr_db
from mtu_compile.runtime.reference import Reference
from mtu_compile.thresholds import Thresholds, judge
from targets.base import Artifact

OUTPUT = "out_sample"


@dataclass(frozen=True)
class TaskCheck:
    """What was measured of one task, and every threshold it missed.

    ``metrics`` holds the UNet calls of all pictures one after the other; latents and pictures are means over them.
    """

    metrics: TaskMetrics
    thresholds: Thresholds
    pictures: int
    failures: tuple[str, ...]

    @property
    def worst_sqnr(self) -> float:
        """Lowest SQNR of any UNet call, decibels."""
        return min(step.sqnr_db for step in self.metrics.steps)

    @property
    def mean_sqnr(self) -> float:
        """Mean SQNR of the UNet calls, decibels."""
        return fmean(step.sqnr_db for step in self.metrics.steps)

    @property
    def worst_cosine(self) -> float:
        """Lowest cosine similarity of any UNet call."""
        return min(step.cosine for step in self.metrics.steps)

    def summary(self) -> dict[str, Any]:
        """What the manifest keeps."""
        deltas = [delta for step in self.metrics.steps for delta in step.guidance]
        return {
            "pictures": self.pictures,
            "worst_sqnr_db": self.worst_sqnr,
            "mean_sqnr_db": self.mean_sqnr,
            "worst_cosine": self.worst_cosine,
            "guidance_ratio": [min(d.ratio for d in deltas), max(d.ratio for d in deltas)] if deltas else None,
            "latent_psnr_db": self.metrics.latent_psnr_db,
            "image_psnr_db": self.metrics.image_psnr_db,
            "ssim": self.metrics.ssim,
            "thresholds": asdict(self.thresholds),
            "passed": not self.failures,
        }

    def to_json(self) -> dict[str, Any]:
        """The summary, every UNet call, and the failures."""
        return {**self.summary(), "steps": self.metrics.to_json()["steps"], "failures": list(self.failures)}


@dataclass(frozen=True)
class CheckResult:
    """The checks of every task of a bundle."""

    tasks: Mapping[str, TaskCheck]

    @property
    def failures(self) -> tuple[str, ...]:
        """Every missed threshold, with its task's name."""
        return tuple(f"{name}: {failure}" for name, task in self.tasks.items() for failure in task.failures)

    def recorded_in(self, manifest: bundle.Manifest) -> bundle.Manifest:
        """``manifest`` with the measured accuracies."""
        entries = {
            name: replace(entry, accuracy=self.tasks[name].summary(), accuracy_reason=None)
            for name, entry in manifest.tasks.items()
        }
        return replace(manifest, tasks=entries)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": not self.failures,
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
        }


def check_bundle(path: Path, *, progress: Progress | None = None) -> CheckResult:
    """Compare every task's engine and pictures with the float reference recorded in the bundle.

    Raises:
        BundleError: the bundle is damaged, or carries no reference for a task.
        AccuracyError: an engine cannot be compared at all (outputs missing, NaN); a merely inaccurate one is a
            failure in the result.
    """
    progress = progress or Progress()
    with progress.stage("verify"):
        manifest = bundle.read(path)
        loaded = runtime.load(path, verify=False)
    checks = {}
    for name, entry in manifest.tasks.items():
        if entry.reference is None:
            raise BundleError(f"the bundle carries no reference for task {name!r}", hint="build it again")
        reference = Reference.load(bundle.resolve(path, entry.reference))
        with progress.stage(f"check {name}", len(reference.trajectories) + 1) as advance:
            checks[name] = _check_task(path, manifest, entry, reference, loaded, advance)
    return CheckResult(checks)


def _check_task(
    path: Path,
    manifest: bundle.Manifest,
    entry: bundle.TaskEntry,
    reference: Reference,
    loaded: runtime.Runtime,
    advance: Advance,
) -> TaskCheck:
    task = entry.task
    engine = bundle.resolve(path, entry.engine.path)
    artifact = Artifact(entry.engine.kind, engine, entry.engine.config, (engine,), manifest.precision, "")  # type: ignore[arg-type]
    inputs = [step for one in reference.trajectories for step in one.inputs]
    outputs = [{OUTPUT: output} for one in reference.trajectories for output in one.outputs]
    runner = targets.get(manifest.target).runner(artifact)
    steps = compare_recorded(runner, inputs, outputs, guidance=task.guidance)
    advance(1)
    latents, pictures, similar = [], [], []
    for one in reference.trajectories:
        made = loaded.run(
            task.name,
            one.prompt,
            image=one.image,
            mask=one.mask,
            steps=reference.steps,
            latents=one.noise,
            paste_unmasked=False,
        )
        latents.append(psnr_db(one.latents, made.latents))
        picture_psnr, picture_ssim = image_metrics(np.asarray(one.picture), np.asarray(made.image))
        pictures.append(picture_psnr)
        similar.append(picture_ssim)
        advance(1)
    metrics = TaskMetrics(steps, fmean(latents), fmean(pictures), fmean(similar))
    thresholds = Thresholds.default(manifest.precision, task.name)
    failures = tuple(str(failure) for failure in judge(metrics, thresholds))
    return TaskCheck(metrics, thresholds, len(reference.trajectories), failures)
