"""What was measured of a bundle, and the verdict: what a build machine and a board have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtu_compile import bundle, runtime
from mtu_compile.core.progress import Advance
from mtu_compile.metrics import StepMetrics, TaskMetrics, image_metrics, psnr_db
from mtu_compile.runtime.reference import Reference
from mtu_compile.thresholds import Thresholds, judge

#: The UNet's output, as the recorded references name it.
OUTPUT = "out_sample"

NO_SSIM = "not measured: scikit-image is not installed here"


@dataclass(frozen=True)
class TaskCheck:
    """What was measured of one task, and every threshold it missed.

    Attributes:
        metrics: the UNet calls of all pictures one after the other; latents and pictures are means over them.
        thresholds: what was asked; ``ssim`` is ``None`` where it cannot be measured.
        pictures: how many were made.
        failures: every miss, in words.
        ssim_reason: why there is no SSIM, if there is none.
    """

    metrics: TaskMetrics
    thresholds: Thresholds
    pictures: int
    failures: tuple[str, ...]
    ssim_reason: str | None = None

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
            "ssim_reason": self.ssim_reason,
            "thresholds": asdict(self.thresholds),
            "passed": not self.failures,
        }

    def to_json(self) -> dict[str, Any]:
        """The summary, every UNet call, and the failures."""
        return {**self.summary(), "steps": self.metrics.to_json()["steps"], "failures": list(self.failures)}


@dataclass(frozen=True)
class CheckResult:
    """The checks of every task of a bundle, and what its networks ran on (``"onnxruntime 1.32.0 on CPU, …"``)."""

    tasks: Mapping[str, TaskCheck]
    measured_with: str

    @property
    def failures(self) -> tuple[str, ...]:
        """Every missed threshold, with its task's name."""
        return tuple(f"{name}: {failure}" for name, task in self.tasks.items() for failure in task.failures)

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
        return replace(manifest, tasks=entries)

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": not self.failures,
            "measured_with": self.measured_with,
            "tasks": {name: task.to_json() for name, task in self.tasks.items()},
        }


def check_task(
    entry: bundle.TaskEntry,
    reference: Reference,
    steps: Sequence[StepMetrics],
    loaded: runtime.Runtime,
    advance: Advance,
) -> TaskCheck:
    """Make the reference's pictures again from the same noise; judge them together with the UNet calls ``steps``."""
    latents, pictures, similar = [], [], []
    for one in reference.trajectories:
        made = loaded.run(
            entry.task.name,
            one.prompt,
            image=one.image,
            mask=one.mask,
            steps=reference.steps,
            latents=one.noise,
            paste_unmasked=False,
        )
        latents.append(psnr_db(one.latents, made.latents))
        picture_psnr, picture_ssim = _compare_pictures(np.asarray(one.picture), np.asarray(made.image))
        pictures.append(picture_psnr)
        similar += [] if picture_ssim is None else [picture_ssim]
        advance(1)
    metrics = TaskMetrics(tuple(steps), fmean(latents), fmean(pictures), fmean(similar) if similar else None)
    thresholds = Thresholds.default(loaded.manifest.precision, entry.task.name)
    if not similar:
        thresholds = replace(thresholds, ssim=None)
    failures = tuple(str(failure) for failure in judge(metrics, thresholds))
    return TaskCheck(metrics, thresholds, len(pictures), failures, None if similar else NO_SSIM)


def _compare_pictures(reference: NDArray[Any], candidate: NDArray[Any]) -> tuple[float, float | None]:
    """PSNR (decibels, peak 1) of two uint8 pictures [H, W, 3], and SSIM where scikit-image is installed."""
    try:
        return image_metrics(reference, candidate)
    except ImportError:
        return psnr_db(reference / 255.0, candidate / 255.0, peak=1.0), None
