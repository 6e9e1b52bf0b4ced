"""One task of an engine that all tasks share, as an engine of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mtu_compile.core.errors import TargetError
from mtu_compile.runtime.batches import COMMON, count_samples, run_samples
from mtu_compile.runtime.engine import Array, Engine, TensorSpec, check_inputs

#: The input [b] of a shared UNet that says of which task each sample is.
TASK_INPUT = "task"


class TaskEngine:
    """A shared engine as one of its tasks sees it.

    It has no input ``task``, its ``sample`` has the channels of this task alone, and its batch is free: the samples of
    a call are run as many at a time as the shared engine takes. What it answers belongs to the caller.

    Not for several threads at once, as no engine is: channels that the task does not have are added in a buffer that is
    kept from call to call.

    Args:
        engine: the shared one. It has an input ``task``.
        task_id: the task's row in the engine's tables (``TaskEntry.task_id``).
        channels: of the noisy latent and the task's condition.
        owned: close the shared engine with this one; otherwise it stays open.

    Attributes:
        inputs: what has to be given, by name.
        outputs: what comes back, by name.

    Raises:
        TargetError: the engine is not a shared one, or has fewer channels than the task.
    """

    def __init__(self, engine: Engine, task_id: int, channels: int, *, owned: bool = False) -> None:
        self.name = f"{getattr(engine, 'name', 'the shared engine')} of task {task_id}"
        specs = engine.inputs
        if TASK_INPUT not in specs:
            raise TargetError(f"{self.name} has no input {TASK_INPUT!r}; it takes {', '.join(specs)}")
        width = specs["sample"].shape[1]
        if width is not None and width < channels:
            raise TargetError(f"{self.name} takes {width} channels, and the task has {channels}")
        self.inputs: Mapping[str, TensorSpec] = {
            key: spec if key in COMMON else _of_any_batch(spec) for key, spec in specs.items() if key != TASK_INPUT
        }
        sample = self.inputs["sample"]
        self.inputs = {**self.inputs, "sample": replace(sample, shape=(None, channels, *sample.shape[2:]))}
        self.outputs: Mapping[str, TensorSpec] = {key: _of_any_batch(spec) for key, spec in engine.outputs.items()}
        self._engine, self._owned, self._closed = engine, owned, False
        self._channels, self._width = channels, channels if width is None else width
        self._id = np.full(1, task_id, specs[TASK_INPUT].dtype)
        self._wide = np.zeros((0, self._width, 0, 0), sample.dtype)

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; see ``Engine``."""
        if self._closed:
            raise TargetError(f"{self.name} is closed")
        check_inputs(self.name, self.inputs, inputs)
        samples = count_samples(self.name, inputs)
        ids = np.repeat(self._id, samples)
        return run_samples(self._engine, {**inputs, "sample": self._widened(inputs["sample"]), TASK_INPUT: ids})

    def close(self) -> None:
        """End the use of this one; the shared engine stays open unless it is ``owned``."""
        if not self._closed:
            self._closed = True
            if self._owned:
                self._engine.close()

    def _widened(self, sample: Array) -> Array:
        """``sample`` with the shared engine's channels; those the task does not have are zero."""
        if self._channels == self._width:
            return sample
        shape = (len(sample), self._width, *sample.shape[2:])
        if self._wide.shape != shape:
            self._wide = np.zeros(shape, sample.dtype)
        self._wide[:, : self._channels] = sample
        return self._wide


def _of_any_batch(spec: TensorSpec) -> TensorSpec:
    return replace(spec, shape=(None, *spec.shape[1:]), most=None)
