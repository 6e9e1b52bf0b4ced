"""Guarded accuracy comparison on Polygraphy.

Polygraphy's ``Comparator.compare_accuracy`` passes when a runner drops an output, renames one, or runs no iteration at
all, and ``Comparator.run`` feeds an input it does not find by name from the one at the same position, cast and reshaped
to fit (0.53.6). Here inputs are matched exactly, results go through ``check_comparable`` first, and verdicts through
explicit thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtu_compile.core.errors import AccuracyError

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner
    from polygraphy.comparator import RunResults

Array = NDArray[Any]
Feed = Mapping[str, Array]
GuidanceKind = Literal["none", "text", "text+image"]

#: Decibels given to arrays that are equal: above what float64 can tell apart (about 320 dB is its own rounding noise,
#: float32's is near 140), and finite, so that it can be written as JSON.
EQUAL_DB = 200.0

#: Side of SSIM's Gaussian window (Wang et al., 2004); a smaller picture has no SSIM.
SSIM_WINDOW = 11


@dataclass(frozen=True)
class GuidanceMetrics:
    """How one direction of classifier-free guidance survived.

    The guidance delta is the difference of two samples of one UNet batch. An engine can agree well with the reference
    on every sample and still lose the delta, which is small and is then multiplied by the guidance scale.

    Attributes:
        direction: ``"text"`` or ``"image"``.
        ratio: norm of the candidate's delta divided by the reference's; 1 is perfect.
        cosine: cosine similarity of the two deltas.
    """

    direction: str
    ratio: float
    cosine: float


@dataclass(frozen=True)
class StepMetrics:
    """One UNet call of a candidate against the recorded reference.

    Attributes:
        timestep: the scheduler's timestep, or ``None`` if the recording has none.
        sqnr_db: 10·log10(Σ reference² / Σ (reference − candidate)²) over all outputs, decibels.
        cosine: cosine similarity, the smallest over the outputs.
        max_abs: largest absolute difference.
        max_rel: ``max_abs`` divided by the largest magnitude of the reference.
        guidance: one entry per guidance direction of the task.
    """

    timestep: float | None
    sqnr_db: float
    cosine: float
    max_abs: float
    max_rel: float
    guidance: tuple[GuidanceMetrics, ...] = ()


@dataclass(frozen=True)
class TaskMetrics:
    """Everything measured of one task; ``None`` is "not measured".

    Attributes:
        steps: the UNet calls, in the order they were recorded.
        latent_psnr_db: final latents, peak = the reference's range, decibels.
        image_psnr_db: final pictures, peak = 1, decibels.
        ssim: structural similarity of the final pictures.
    """

    steps: tuple[StepMetrics, ...]
    latent_psnr_db: float | None = None
    image_psnr_db: float | None = None
    ssim: float | None = None

    def to_json(self) -> dict[str, Any]:
        """For the manifest and the report; all numbers are finite."""
        return asdict(self)


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
#: is visible below about 12; bf16: 8 bits of mantissa give 38 to 40 dB a step; fp32: rounding order only.
#: Guidance deltas are small differences, so they are allowed more than the outputs they come from.
PRECISION_THRESHOLDS: Mapping[str, Thresholds] = {
    "int8": Thresholds(12.0, 0.97, 0.6, 0.7, 18.0, 20.0, 0.85),
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


def compare_recorded(
    runner: BaseRunner,
    inputs: Sequence[Feed],
    reference: Sequence[Feed],
    *,
    timesteps: Sequence[float | None] | None = None,
    guidance: GuidanceKind = "none",
) -> tuple[StepMetrics, ...]:
    """Run a candidate over recorded UNet inputs and compare it with the recorded float outputs.

    Args:
        runner: the candidate, a Polygraphy runner that is not active (``Target.runner``).
        inputs: per call, arrays by input name of the static graph.
        reference: per call, float arrays by output name.
        timesteps: per call; read from the input ``timestep`` if not given.
        guidance: the task's kind of guidance, which says what the samples of a batch are: ``"text"`` [without, with
            prompt], ``"text+image"`` [without both, with image, with both].

    Raises:
        AccuracyError: the two cannot be compared (see ``check_comparable``), or the candidate cannot run the inputs.
    """
    from polygraphy.comparator import Comparator, RunResults
    from polygraphy.exception import PolygraphyException

    if not inputs:
        raise AccuracyError("the candidate would run zero iterations", hint="the recorded inputs are empty")
    if timesteps is None:
        timesteps = [float(np.ravel(feed["timestep"])[0]) if "timestep" in feed else None for feed in inputs]
    if len(timesteps) != len(inputs):
        raise AccuracyError(f"{len(timesteps)} timesteps were given for {len(inputs)} recorded inputs")
    results = RunResults()
    results.add([dict(outputs) for outputs in reference], runner_name="reference")
    with _quiet_polygraphy():
        try:
            candidate = Comparator.run([runner], data_loader=_Recording(inputs))
        except (PolygraphyException, RuntimeError) as error:
            raise AccuracyError(f"the candidate cannot run the recorded inputs: {_telling(error)}") from error
    results.extend(candidate)
    check_comparable(results)
    return tuple(
        step_metrics(dict(want.items()), dict(have.items()), timestep=timestep, guidance=guidance)
        for want, have, timestep in zip(results[0][1], results[1][1], timesteps, strict=True)
    )


class _Recording:
    """Recorded inputs as a Polygraphy data loader that refuses a runner with other inputs.

    Polygraphy assigns ``input_metadata`` before it iterates.
    """

    def __init__(self, inputs: Sequence[Feed]) -> None:
        self._inputs = inputs
        self.input_metadata: Mapping[str, Any] = {}

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for index, feed in enumerate(self._inputs):
            if differing := sorted(set(feed) ^ set(self.input_metadata)):
                side = "recording" if differing[0] in feed else "candidate"
                raise AccuracyError(f"only the {side} has an input {differing[0]!r}")
            for name, array in feed.items():
                wanted = self.input_metadata[name].shape
                if wanted is not None and not _fits(array.shape, wanted):
                    shapes = f"{array.shape} was recorded in call {index}, the candidate takes {tuple(wanted)}"
                    raise AccuracyError(f"input {name!r}: shape {shapes}")
            yield dict(feed)


def _fits(shape: Sequence[int], wanted: Sequence[Any]) -> bool:
    """Whether ``shape`` is an instance of ``wanted``, in which a dimension that is no number (or −1) is any number."""
    if len(shape) != len(wanted):
        return False
    return all(not isinstance(w, int) or w in (-1, n) for n, w in zip(shape, wanted, strict=True))


def check_comparable(results: RunResults) -> None:
    """Refuse what Polygraphy would compare in part, or not at all, and call passed.

    Args:
        results: two or more runners' results; the first is the reference.

    Raises:
        AccuracyError: fewer than two runners; no iterations, or different numbers of them; output names, shapes or
            value kinds that differ in either direction; NaN or Inf in any output.
    """
    runs = list(results.items())
    if len(runs) < 2:
        raise AccuracyError(f"nothing to compare: {len(runs)} runner was given")
    reference_name, reference = runs[0]
    for name, iterations in runs:
        if not iterations:
            raise AccuracyError(f"{name} ran zero iterations", hint="the recorded inputs are empty")
        if len(iterations) != len(reference):
            raise AccuracyError(f"{name} ran {len(iterations)} iterations, {reference_name} {len(reference)}")
    for index, wanted in enumerate(reference):
        if not wanted:
            raise AccuracyError(f"{reference_name} has no outputs in iteration {index}")
        for name, iterations in runs:
            _check_iteration(reference_name, wanted, name, iterations[index], index)


def _check_iteration(reference_name: str, wanted: Any, name: str, outputs: Any, index: int) -> None:
    names, expected = set(outputs.keys()), set(wanted.keys())
    if missing := sorted(expected - names):
        raise AccuracyError(f"{name} has no output {missing[0]!r} in iteration {index}; it has {sorted(names)}")
    if extra := sorted(names - expected):
        raise AccuracyError(f"{name} has an output {extra[0]!r} that {reference_name} has not, in iteration {index}")
    for output, array in outputs.items():
        if array.shape != wanted[output].shape:
            shapes = f"{tuple(array.shape)}, not {tuple(wanted[output].shape)}"
            raise AccuracyError(f"{name}: output {output!r} has shape {shapes}, in iteration {index}")
        if array.size == 0:
            raise AccuracyError(f"{name}: output {output!r} is empty, in iteration {index}")
        if bad := int(np.count_nonzero(~np.isfinite(np.asarray(array, dtype=np.float64)))):
            raise AccuracyError(f"{name}: output {output!r} has {bad} NaN or Inf values, in iteration {index}")


def compare_runs(results: RunResults, *, sqnr_db: float, cosine: float) -> None:
    """Polygraphy's own comparison of several runners, guarded and with explicit thresholds.

    Args:
        results: of ``Comparator.run``, or put together from recorded arrays; each runner is compared with the next.
        sqnr_db: least signal-to-noise ratio of each output in each iteration, decibels.
        cosine: least cosine similarity of each output in each iteration.

    Raises:
        AccuracyError: the results are not comparable, or an output is below a threshold.
    """
    from polygraphy.comparator import Comparator, CosineSimilarityCompareFunc, SnrCompareFunc

    check_comparable(results)
    functions = [SnrCompareFunc(snr_threshold=sqnr_db), CosineSimilarityCompareFunc(cosine_similarity_threshold=cosine)]
    with _quiet_polygraphy():
        accuracy = Comparator.compare_accuracy(results, compare_func=functions)
    for metric, threshold, result in zip(("sqnr_db", "cosine"), (sqnr_db, cosine), accuracy, strict=True):
        for (first, second), iterations in result.items():
            for index, outputs in enumerate(iterations):
                for output, verdict in outputs.items():
                    if not verdict:
                        value = next(iter(verdict.metric_values().values()))
                        where = f"output {output!r}, iteration {index}, {second} against {first}"
                        raise AccuracyError(f"{Failure(metric, float(value), threshold)} ({where})")


def step_metrics(
    reference: Feed, candidate: Feed, *, timestep: float | None, guidance: GuidanceKind = "none"
) -> StepMetrics:
    """Metrics of one UNet call; both arguments hold arrays by output name, of the same names and shapes."""
    pairs = [(_wide(array), _wide(candidate[name])) for name, array in reference.items()]
    differences = [np.abs(want - have).max() for want, have in pairs]
    peak = max(float(np.abs(want).max()) for want, _ in pairs)
    largest = float(max(differences))
    return StepMetrics(
        timestep=timestep,
        sqnr_db=sqnr_db(*(np.concatenate([array.ravel() for array in side]) for side in zip(*pairs, strict=True))),
        cosine=min(cosine(want, have) for want, have in pairs),
        max_abs=largest,
        max_rel=largest / peak if peak else largest,
        guidance=guidance_metrics(*pairs[0], guidance),
    )


def guidance_metrics(reference: Array, candidate: Array, guidance: GuidanceKind) -> tuple[GuidanceMetrics, ...]:
    """How the guidance deltas of one UNet output [b, 4, h, w] survived; empty without guidance.

    Raises:
        AccuracyError: the batch is not a whole number of guided pictures.
    """
    directions: dict[str, tuple[tuple[str, int, int], ...]] = {
        "none": (),
        "text": (("text", 0, 1),),
        "text+image": (("image", 0, 1), ("text", 1, 2)),
    }
    wanted = directions[guidance]
    batch = len(wanted) + 1
    if reference.shape[0] % batch:
        samples = reference.shape[0]
        raise AccuracyError(f"guidance {guidance!r} takes {batch} samples a picture, the output has {samples}")
    pictures = reference.shape[0] // batch
    want = _wide(reference).reshape(batch, pictures, *reference.shape[1:])
    have = _wide(candidate).reshape(batch, pictures, *reference.shape[1:])
    metrics = []
    for direction, start, end in wanted:
        expected, found = want[end] - want[start], have[end] - have[start]
        norm, found_norm = float(np.linalg.norm(expected)), float(np.linalg.norm(found))
        ratio = found_norm / norm if norm else 1.0 + found_norm
        metrics.append(GuidanceMetrics(direction, ratio, cosine(expected, found)))
    return tuple(metrics)


def sqnr_db(reference: Array, candidate: Array) -> float:
    """Signal-to-quantisation-noise ratio of arrays of equal shape in decibels, from −200 to 200 (equal arrays)."""
    want, have = _pair(reference, candidate)
    return _decibels(float(np.sum(np.square(want))), float(np.sum(np.square(want - have))))


def cosine(reference: Array, candidate: Array) -> float:
    """Cosine similarity of two arrays of equal shape; two zero arrays have 1, one zero array 0."""
    want, have = _pair(reference, candidate)
    norms = float(np.linalg.norm(want)), float(np.linalg.norm(have))
    if min(norms) == 0.0:
        return 1.0 if max(norms) == 0.0 else 0.0
    return float(np.clip(np.vdot(want / norms[0], have / norms[1]), -1.0, 1.0))


def psnr_db(reference: Array, candidate: Array, *, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in decibels, at most 200 (equal arrays).

    Args:
        peak: the largest possible value; the reference's range (max − min) if not given, which suits latents.
    """
    want, have = _pair(reference, candidate)
    if peak is None:
        peak = float(want.max() - want.min())
    return _decibels(peak**2, float(np.mean(np.square(want - have))))


def image_metrics(reference: Array, candidate: Array) -> tuple[float, float]:
    """PSNR (decibels, peak 1) and SSIM of two pictures [H, W, 3], uint8 or floats in [0, 1].

    SSIM is that of Wang et al., 2004: Gaussian window of 11, sigma 1.5, mean over pixels and channels.

    Raises:
        AccuracyError: pictures of different or other shapes, smaller than the window, or not finite.
    """
    from skimage.metrics import structural_similarity

    want, have = _pair(_unit_picture(reference), _unit_picture(candidate))
    similarity = structural_similarity(
        want, have, channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return psnr_db(want, have, peak=1.0), float(similarity)


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


def _wide(array: Array) -> NDArray[np.float64]:
    return np.asarray(array, dtype=np.float64)


def _pair(reference: Array, candidate: Array) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both in float64; ``AccuracyError`` unless they are finite and of the same, non-empty shape."""
    want, have = _wide(reference), _wide(candidate)
    if want.shape != have.shape or want.size == 0:
        raise AccuracyError(f"arrays of shapes {want.shape} and {have.shape} cannot be compared")
    if not (np.isfinite(want).all() and np.isfinite(have).all()):
        raise AccuracyError("an array that has to be compared has NaN or Inf values")
    return want, have


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return EQUAL_DB
    if signal == 0.0:
        return -EQUAL_DB
    return float(np.clip(10 * math.log10(signal / noise), -EQUAL_DB, EQUAL_DB))


def _unit_picture(picture: Array) -> NDArray[np.float64]:
    """A picture as float64 in [0, 1]; ``AccuracyError`` if it is not one."""
    if picture.ndim != 3 or picture.shape[-1] != 3 or min(picture.shape[:2]) < SSIM_WINDOW:
        raise AccuracyError(f"a picture of shape {picture.shape} is not [H, W, 3] with sides of {SSIM_WINDOW} or more")
    wide = _wide(picture) / (255.0 if picture.dtype == np.uint8 else 1.0)
    if np.isfinite(wide).all() and (wide.min() < -1e-6 or wide.max() > 1 + 1e-6):
        raise AccuracyError(f"a float picture ranges from {wide.min():.3g} to {wide.max():.3g}, not within [0, 1]")
    return wide


@contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    """Keep Polygraphy's log, which goes to standard output, out of it; errors are raised all the same."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


def _telling(error: BaseException) -> str:
    """An exception's first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
