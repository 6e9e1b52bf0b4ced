"""Guarded accuracy comparison on Polygraphy.

Polygraphy's ``Comparator.compare_accuracy`` passes when a runner drops an output, renames one, or runs no iteration at
all, and ``Comparator.run`` feeds an input it does not find by name from the one at the same position, cast and reshaped
to fit (0.53.6). Here inputs are matched exactly, results go through ``check_comparable`` first, and verdicts through
explicit thresholds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mtu_compile.accuracy.metrics import Array, Feed, StepMetrics, step_metrics
from mtu_compile.accuracy.thresholds import Failure
from mtu_compile.core.errors import AccuracyError
from mtu_compile.core.guidance import Guidance

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner
    from polygraphy.comparator import RunResults


def compare_recorded(
    runner: BaseRunner,
    inputs: Sequence[Feed],
    reference: Sequence[Feed],
    *,
    timesteps: Sequence[float | None] | None = None,
    guidance: Guidance = "none",
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


@contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    """Keep Polygraphy's log, which goes to standard output, out of it; errors are raised all the same."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield


def _telling(error: BaseException) -> str:
    """An exception's first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
