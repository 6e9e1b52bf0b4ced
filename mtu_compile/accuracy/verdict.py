"""What was measured of a bundle, and the verdict: what a build machine and a board have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from PIL import Image

from mtu_compile import bundle, runtime
from mtu_compile.accuracy.cached import CachedPictures, judge_cached
from mtu_compile.accuracy.calls import StepMetrics
from mtu_compile.accuracy.measuring import measure_picture
from mtu_compile.accuracy.metric import Subject
from mtu_compile.accuracy.pictures import Perceptual
from mtu_compile.accuracy.summary import absent_reasons, summarise
from mtu_compile.accuracy.task_metrics import PictureMetrics, TaskMetrics
from mtu_compile.accuracy.thresholds import Thresholds, in_words, judge
from mtu_compile.core.precision import Precision
from mtu_compile.core.progress import Advance
from mtu_compile.core.tasks import Task
from mtu_compile.runtime.reference import Reference

#: What a board measures with.
WITHOUT_TORCH = Perceptual(reason="not measured: a board's check does without torch")


@dataclass(frozen=True)
class TaskCheck:
    """What was measured of one task, and every threshold it missed.

    Attributes:
        metrics: the UNet calls of all pictures one after the other, each picture, and means over the pictures.
        thresholds: what was asked; nothing where a metric does not apply to the task or cannot be measured here.
        pictures: how many were made.
        failures: every miss, in words, one for each metric.
        reasons: figure, or group of them → why there is none.
        made: the candidate's pictures, nothing pasted back, in the order of the reference's trajectories; not in JSON.
            All their UNet calls are whole.
        cached: the pictures with fewer whole calls, where the bundle makes such.
    """

    metrics: TaskMetrics
    thresholds: Thresholds
    pictures: int
    failures: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)
    made: tuple[Image.Image, ...] = field(default=(), repr=False, compare=False)
    cached: CachedPictures | None = None

    @property
    def ssim_reason(self) -> str | None:
        """Why there is no SSIM, if there is none."""
        return self.reasons.get("ssim")

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
        """What the manifest keeps: the figures of every metric, and the verdict."""
        figures = summarise(self.metrics)
        if self.metrics.regions:
            figures["region"] = {"kind": self.metrics.regions[0].kind, **figures["region"]}
        return {
            "pictures": self.pictures,
            **figures,
            "ssim_reason": self.ssim_reason,
            "reasons": dict(self.reasons),
            "thresholds": self.thresholds.to_json(),
            **({} if self.cached is None else {"step_cache": self.cached.to_json()}),
            "passed": not self.failures,
        }

    def to_json(self) -> dict[str, Any]:
        """The summary, every UNet call, every picture, and the failures."""
        return {
            **self.summary(),
            "steps": [asdict(step) for step in self.metrics.steps],
            "picture_metrics": [picture.to_json() for picture in self.metrics.pictures],
            "failures": list(self.failures),
        }


@dataclass(frozen=True)
class CheckResult:
    """The checks of every task of a bundle.

    Attributes:
        tasks: by name.
        measured_with: what the networks ran on (``"onnxruntime 1.32.0 on CPU, …"``).
        precision: of the bundle.
        instruction_sets: where a CPU runs the bundle, what it gives at each instruction set tried.
    """

    tasks: Mapping[str, TaskCheck]
    measured_with: str
    precision: Precision
    instruction_sets: tuple[bundle.InstructionSetProof, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Every missed threshold, with the name of its task or instruction set."""
        tasks = tuple(f"{name}: {failure}" for name, task in self.tasks.items() for failure in task.failures)
        sets = tuple(f"at {proof.level}: {failure}" for proof in self.instruction_sets for failure in proof.failures)
        return (*tasks, *sets)

    def recorded_in(self, manifest: bundle.Manifest) -> bundle.Manifest:
        """``manifest`` with the measured accuracies."""
        entries = {
            name: replace(
                entry,
                accuracy={"measured_with": self.measured_with, **self.tasks[name].summary()},
                accuracy_reason=None,
            )
            for name, entry in manifest.tasks.items()
        }
        return replace(manifest, tasks=entries, instruction_sets=self.instruction_sets)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": not self.failures,
            "measured_with": self.measured_with,
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
            "instruction_sets": [proof.to_json() for proof in self.instruction_sets],
        }


def check_task(
    entry: bundle.TaskEntry,
    reference: Reference,
    steps: Sequence[StepMetrics],
    loaded: runtime.Runtime,
    advance: Advance,
    perceptual: Perceptual = WITHOUT_TORCH,
) -> TaskCheck:
    """Make the reference's pictures again from the same noise; judge them together with the UNet calls ``steps``."""
    task = entry.task
    pictures, made = _pictures(task, reference, loaded, advance, perceptual, cached=False)
    metrics = TaskMetrics(tuple(steps), tuple(pictures))
    wanted = any(trajectory.target is not None for trajectory in reference.trajectories)
    reasons, absent = absent_reasons(Subject(task, metrics, perceptual, wanted))
    thresholds = Thresholds.of_bundle(loaded.manifest.precision, entry.thresholds).without(absent)
    failures, cached = in_words(judge(metrics, thresholds), len(metrics.steps)), None
    if entry.step_cache is not None:
        others, _ = _pictures(task, reference, loaded, advance, perceptual, cached=True)
        cached = judge_cached(others, entry.step_cache.limits)
        failures += cached.failures
    return TaskCheck(metrics, thresholds, len(pictures), failures, reasons, tuple(made), cached)


def pictures_of(entry: bundle.TaskEntry, reference: Reference) -> int:
    """How many pictures ``check_task`` makes: twice those of the reference where a step cache is judged, too."""
    return len(reference.trajectories) * (1 if entry.step_cache is None else 2)


def _pictures(
    task: Task, reference: Reference, loaded: runtime.Runtime, advance: Advance, perceptual: Perceptual, *, cached: bool
) -> tuple[list[PictureMetrics], list[Image.Image]]:
    """The reference's pictures made again from the same noise, and what is measured of them.

    Args:
        cached: as the bundle makes them, with fewer whole UNet calls; otherwise all are whole.
    """
    pictures, made = [], []
    for trajectory in reference.trajectories:
        result = loaded.run(
            task.name,
            trajectory.prompt,
            image=trajectory.image,
            mask=trajectory.mask,
            steps=reference.steps,
            seed=trajectory.seed,
            latents=trajectory.noise,
            paste_unmasked=False,
            step_cache=cached,
        )
        pictures.append(measure_picture(trajectory, result, task, perceptual, loaded.manifest.fit))
        made.append(result.image)
        advance(1)
    return pictures, made
