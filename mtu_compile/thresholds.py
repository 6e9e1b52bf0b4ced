"""How accurate a task has to be, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mtu_compile.core.errors import AccuracyError
from mtu_compile.metrics import TaskMetrics


@dataclass(frozen=True)
class Thresholds:
    """Least accuracy of a task; ``None`` leaves a metric unjudged, which has to be asked for.

    Attributes:
        sqnr_db: UNet output, at every timestep, decibels.
        cosine: UNet output, at every timestep.
        guidance_ratio: a guidance delta's norm may shrink to this and grow to its inverse.
        guidance_cosine: direction of a guidance delta, at every timestep.
        latent_psnr_db: final latents, decibels.
        image_psnr_db: final pictures, decibels.
        ssim: final pictures.
    """

    sqnr_db: float | None
    cosine: float | None
    guidance_ratio: float | None
    guidance_cosine: float | None
    latent_psnr_db: float | None
    image_psnr_db: float | None
    ssim: float | None

    @classmethod
    def default(cls, precision: str, task: str | None = None) -> Thresholds:
        """Defaults of a precision; a task without its own entry takes the precision's.

        Raises:
            AccuracyError: there are no defaults for the precision.
        """
        try:
            return TASK_THRESHOLDS.get((precision, task or ""), PRECISION_THRESHOLDS[precision])
        except KeyError:
            known = ", ".join(PRECISION_THRESHOLDS)
            raise AccuracyError(f"no accuracy thresholds for precision {precision!r}", hint=f"known: {known}") from None


#: Per precision. int8: a network of the Stable Diffusion kind quantised by NNCF measures 20 to 28 dB a step, and noise
#: is visible below about 12; fp8 measures the same as int8; bf16: 8 bits of mantissa give 38 to 40 dB a step; fp32:
#: rounding order only.
#: Guidance deltas are small differences, so they are allowed more than the outputs they come from.
PRECISION_THRESHOLDS: Mapping[str, Thresholds] = {
    "int8": Thresholds(12.0, 0.97, 0.6, 0.7, 18.0, 20.0, 0.85),
    "fp8": Thresholds(12.0, 0.97, 0.6, 0.7, 18.0, 20.0, 0.85),
    "bf16": Thresholds(24.0, 0.998, 0.85, 0.95, 26.0, 28.0, 0.95),
    "fp16": Thresholds(30.0, 0.999, 0.9, 0.98, 30.0, 32.0, 0.97),
    "fp32": Thresholds(60.0, 0.99999, 0.99, 0.9999, 60.0, 50.0, 0.999),
}

#: Tasks that need other defaults, by (precision, task name).
TASK_THRESHOLDS: Mapping[tuple[str, str], Thresholds] = {}


@dataclass(frozen=True)
class Failure:
    """A metric below its threshold.

    Attributes:
        metric: name of the metric.
        value: what was measured; ``None`` if it was not.
        threshold: what was wanted.
        timestep: where, for metrics of single UNet calls.
    """

    metric: str
    value: float | None
    threshold: float
    timestep: float | None = None

    def __str__(self) -> str:
        where = "" if self.timestep is None else f" at timestep {self.timestep:g}"
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        return f"{self.metric} {value}{where}, threshold {self.threshold:g}"


def judge(metrics: TaskMetrics, thresholds: Thresholds) -> list[Failure]:
    """Everything below its threshold; an empty list is a pass. A metric that was not measured fails its threshold."""
    failures: list[Failure] = []

    def least(metric: str, value: float | None, threshold: float | None, timestep: float | None = None) -> None:
        # NaN is neither above nor below: only "at least" may pass.
        if threshold is not None and not (value is not None and value >= threshold):
            failures.append(Failure(metric, value, threshold, timestep))

    if not metrics.steps:
        least("sqnr_db", None, thresholds.sqnr_db)
        least("cosine", None, thresholds.cosine)
    for step in metrics.steps:
        least("sqnr_db", step.sqnr_db, thresholds.sqnr_db, step.timestep)
        least("cosine", step.cosine, thresholds.cosine, step.timestep)
        for delta in step.guidance:
            name = f"{delta.direction}_guidance"
            least(f"{name}_ratio", delta.ratio, thresholds.guidance_ratio, step.timestep)
            if thresholds.guidance_ratio is not None and delta.ratio > 1 / thresholds.guidance_ratio:
                failures.append(Failure(f"{name}_ratio", delta.ratio, 1 / thresholds.guidance_ratio, step.timestep))
            least(f"{name}_cosine", delta.cosine, thresholds.guidance_cosine, step.timestep)
    least("latent_psnr_db", metrics.latent_psnr_db, thresholds.latent_psnr_db)
    least("image_psnr_db", metrics.image_psnr_db, thresholds.image_psnr_db)
    least("ssim", metrics.ssim, thresholds.ssim)
    return failures


def require_accuracy(task: str, metrics: TaskMetrics, thresholds: Thresholds) -> None:
    """``AccuracyError`` (exit code 3) that lists every failure of the task."""
    if failures := judge(metrics, thresholds):
        listed = "; ".join(str(failure) for failure in failures[:5])
        more = f"; and {len(failures) - 5} more" if len(failures) > 5 else ""
        raise AccuracyError(
            f"task {task!r} is less accurate than it has to be: {listed}{more}",
            hint="calibrate with more samples, keep sensitive layers in float, or build with --bf16",
        )
