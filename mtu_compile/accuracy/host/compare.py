"""Any Polygraphy runner as a candidate of ``mtu_compile.accuracy.recorded``, which has the guards.

Polygraphy's ``Comparator.compare_accuracy`` passes when a runner drops an output, renames one, or runs no iteration at
all, and ``Comparator.run`` feeds an input it does not find by name from the one at the same position, cast and reshaped
to fit (0.53.6). So runners are Polygraphy's here, and the comparison is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from mtu_compile.accuracy.calls import StepMetrics
from mtu_compile.accuracy.recorded import RecordedCall, compare_recorded
from mtu_compile.core.errors import AccuracyError, first_line
from mtu_compile.core.guidance import Guidance
from mtu_compile.runtime.engine import Array, TensorSpec

if TYPE_CHECKING:
    from polygraphy.backend.base import BaseRunner


def compare_runner(
    runner: BaseRunner, calls: Sequence[RecordedCall], *, guidance: Guidance = "none"
) -> tuple[StepMetrics, ...]:
    """Run a Polygraphy runner over recorded UNet calls and compare it with the float original.

    Args:
        runner: the candidate, not active (``Target.runner``).
        calls: in the order they are run.
        guidance: the task's kind of guidance, see ``accuracy.recorded.compare_recorded``.

    Raises:
        AccuracyError: the two cannot be compared (see there), or the candidate cannot run the inputs.
    """
    with _quiet_polygraphy(), _running(), runner:
        return compare_recorded(_Runner(runner), calls, guidance=guidance, name=runner.name)


class _Runner:
    """An active runner as a candidate."""

    def __init__(self, runner: BaseRunner) -> None:
        self._runner = runner
        self.inputs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, tuple(_size(size) for size in one.shape), np.dtype(np.float32))
            for name, one in runner.get_input_metadata().items()
        }

    def __call__(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        with _running():
            return dict(self._runner.infer(dict(inputs)))


def _size(size: Any) -> int | None:
    """Of a dimension; Polygraphy has names, −1 or ``None`` for those that are open."""
    return size if isinstance(size, int) and size >= 0 else None


@contextmanager
def _running() -> Iterator[None]:
    """Polygraphy's own errors, and those of the runtimes behind it, as ours."""
    from polygraphy.exception import PolygraphyException

    try:
        yield
    except (PolygraphyException, RuntimeError) as error:
        raise AccuracyError(f"the candidate cannot run the recorded inputs: {first_line(error)}") from error


@contextmanager
def _quiet_polygraphy() -> Iterator[None]:
    """Keep Polygraphy's log, which goes to standard output, out of it; errors are raised all the same."""
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield
