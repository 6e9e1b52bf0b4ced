"""What was measured of a bundle, and the verdict: what a build machine and a board have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

from PIL import Image

from mtu_compile import bundle, runtime
from mtu_compile.accuracy.metrics import StepMetrics
from mtu_compile.accuracy.pictures import Perceptual, measure_picture
from mtu_compile.accuracy.task_metrics import TaskMetrics
from mtu_compile.accuracy.thresholds import Thresholds, in_words, judge
from mtu_compile.core.progress import Advance
from mtu_compile.core.tasks import Task
from mtu_compile.runtime.reference import Reference

NO_SCIKIT_IMAGE = "not measured: scikit-image is not installed here"

#: What a board measures with.
WITHOUT_TORCH = Perceptual(reason="not measured: a board's check does without torch")


@dataclass(frozen=True)
class TaskCheck:
    """What was measured of one task, and every threshold it missed.

    Attributes:
        metrics: the UNet calls of all pictures one after the other, each picture, and means over the pictures.
        thresholds: what was asked; ``None`` where a metric does not apply to the task or cannot be measured here.
        pictures: how many were made.
        failures: every miss, in words, one for each metric.
        reasons: metric → why there is none.
        made: the candidate's pictures, nothing pasted back, in the order of the reference's trajectories; not in JSON.
    """

    metrics: TaskMetrics
    thresholds: Thresholds
    pictures: int
    failures: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)
    made: tuple[Image.Image, ...] = field(default=(), repr=False, compare=False)

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
        """What the manifest keeps."""
        measured = self.metrics
        deltas = [delta for step in measured.steps for delta in step.guidance]
        return {
            "pictures": self.pictures,
            "worst_sqnr_db": self.worst_sqnr,
            "mean_sqnr_db": self.mean_sqnr,
            "worst_cosine": self.worst_cosine,
            "guidance_ratio": [min(d.ratio for d in deltas), max(d.ratio for d in deltas)] if deltas else None,
            "guidance": {name: asdict(one) for name, one in measured.guidance.items()} or None,
            "latent_psnr_db": measured.latent_psnr_db,
            "image_psnr_db": measured.image_psnr_db,
            "ssim": measured.ssim,
            "ssim_reason": self.ssim_reason,
            "colour_difference": measured.colour_difference,
            "vif": measured.vif,
            "inside_psnr_db": measured.inside_psnr_db,
            "outside_psnr_db": measured.outside_psnr_db,
            "region": measured.region,
            "truth_drop_db": measured.truth_drop_db,
            "truth": measured.truth,
            "clip": measured.clip,
            "reasons": dict(self.reasons),
            "thresholds": asdict(self.thresholds),
            "passed": not self.failures,
        }

    def to_json(self) -> dict[str, Any]:
        """The summary, every UNet call, every picture, and the failures."""
        measured = self.metrics.to_json()
        more = {"steps": measured["steps"], "picture_metrics": measured["pictures"]}
        return {**self.summary(), **more, "failures": list(self.failures)}


@dataclass(frozen=True)
class CheckResult:
    """The checks of every task of a bundle.

    Attributes:
        tasks: by name.
        measured_with: what the networks ran on (``"onnxruntime 1.32.0 on CPU, …"``).
        instruction_sets: where a CPU runs the bundle, what it gives at each instruction set tried.
    """

    tasks: Mapping[str, TaskCheck]
    measured_with: str
    instruction_sets: tuple[bundle.InstructionSetProof, ...] = ()

    @property
    def failures(self) -> tuple[str, ...]:
        """Every missed threshold, with the name of its task or instruction set."""
        tasks = tuple(f"{name}: {failure}" for name, task in self.tasks.items() for failure in task.failures)
        sets = tuple(f"at {one.level}: {failure}" for one in self.instruction_sets for failure in one.failures)
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
            "instruction_sets": [one.to_json() for one in self.instruction_sets],
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
    pictures, made = [], []
    for one in reference.trajectories:
        result = loaded.run(
            task.name,
            one.prompt,
            image=one.image,
            mask=one.mask,
            steps=reference.steps,
            seed=one.seed,
            latents=one.noise,
            paste_unmasked=False,
        )
        pictures.append(measure_picture(one, result, task, perceptual, loaded.manifest.fit))
        made.append(result.image)
        advance(1)
    metrics = TaskMetrics.of(steps, pictures)
    reasons = _unmeasured(metrics, reference, task, perceptual)
    thresholds = Thresholds.default(loaded.manifest.precision, task.name).without(reasons)
    failures = in_words(judge(metrics, thresholds), len(metrics.steps))
    return TaskCheck(metrics, thresholds, len(pictures), failures, reasons, tuple(made))


def _unmeasured(metrics: TaskMetrics, reference: Reference, task: Task, perceptual: Perceptual) -> dict[str, str]:
    """Metric → why it does not apply to a task, or cannot be measured here.

    A metric that applies and was not measured for no such reason is left out, and so fails its threshold.
    """
    reasons = {}
    if metrics.ssim is None:
        reasons["ssim"] = NO_SCIKIT_IMAGE
    if metrics.colour_difference is None:
        reasons["colour_difference"] = NO_SCIKIT_IMAGE
    if perceptual.vif is None:
        reasons["vif"] = str(perceptual.reason)
    elif metrics.vif is None:
        reasons["vif"] = "not measured: the pictures are too small, or blank"
    if metrics.region is None:
        reasons["inside_psnr_db"] = reasons["outside_psnr_db"] = "does not apply: the task makes the whole picture"
    else:
        if metrics.inside_psnr_db is None:
            reasons["inside_psnr_db"] = "does not apply: the float original changes nothing"
        if metrics.outside_psnr_db is None:
            reasons["outside_psnr_db"] = "does not apply: nothing of the pictures was to stay"
    if not task.condition:
        reasons["truth_drop_db"] = "not judged: a picture made of words alone has no single right answer"
    elif all(one.target is None for one in reference.trajectories):
        reasons["truth_drop_db"] = "does not apply: the data have no wanted pictures"
    if not perceptual.clip:
        reasons["clip"] = "not measured: no CLIP model was given (mtu-compile check --clip DIR)"
    return reasons
