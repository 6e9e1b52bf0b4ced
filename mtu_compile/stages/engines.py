"""Engines: text encoder and autoencoder, and one UNet a task, each compared with the float original where it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mtu_compile.accuracy.host.parity import Backend, parity
from mtu_compile.bundle import EngineRef, EngineState
from mtu_compile.core.progress import Progress
from mtu_compile.core.tasks import Task
from mtu_compile.runtime.engine import Engine, open_engine
from mtu_compile.runtime.reference import Reference
from mtu_compile.stages.half_parts import parts_in_half, unet_in_half
from mtu_compile.stages.job import BuiltUnet, Gate, Model, Parts
from mtu_compile.stages.precision import lower
from targets.base import Artifact, Precision, Target

#: Recorded UNet calls each backend is compared on; enough for one trajectory's early, middle and late steps.
PARITY_CALLS = 6


def build_parts(
    target: Target,
    precision: Precision,
    model: Model,
    graphs: Mapping[str, Path],
    references: Sequence[Path],
    folder: Path,
    work: Path,
    progress: Progress,
) -> Parts:
    """Text encoder and autoencoder as engines in ``folder``, in the float type that suits a UNet in ``precision``.

    Args:
        model: the float original.
        graphs: by part, its float graph.
        references: float references of all tasks, which tell how large the parts' numbers get.
        work: existing folder for what the bundle does not carry.

    Raises:
        NotFiniteError: a part overflows float16, and the target has no wider type.
        BuildError: the toolchain refused a graph.
    """
    with progress.stage("text encoder and autoencoder"):
        chosen = parts_in_half(target, precision, model, graphs, references, work)
        engines = {}
        for name, graph in graphs.items():
            lowered, _ = lower(target, graph, chosen[name][0])
            engines[name] = target.build(lowered, folder / name, precision=chosen[name][0], progress=progress)
    ranges = {name: (kind, measured) for name, (kind, measured) in chosen.items() if measured is not None}
    return Parts(engines, ranges)


def build_unet(
    target: Target,
    precision: Precision,
    task: Task,
    graph: Path,
    reference_file: Path,
    folder: Path,
    gate: Gate,
    progress: Progress,
) -> BuiltUnet:
    """A task's lowered ``graph`` as an engine in ``folder``, and what every backend here computes from the graph.

    Args:
        reference_file: the task's float reference.
        gate: whether numbers that float16 does not hold, and backends that disagree, fail the build.

    Raises:
        NotFiniteError: numbers beyond float16, unless the gate is off.
        BuildError: the toolchain refused the graph.
        AccuracyError: a backend computes something else than the others, and the gate is to fail.
    """
    reference = Reference.load(reference_file)
    measured = unet_in_half(target, precision, task.name, graph, reference, judge=gate != "off")
    with progress.stage(f"build {task.name}"):
        began = time.monotonic()
        artifact = target.build(graph, folder, precision=precision, progress=progress)
        seconds = round(time.monotonic() - began, 1)
    with progress.stage(f"parity {task.name}"):
        agreement = parity(
            graph,
            reference,
            guidance=task.guided,
            calls=PARITY_CALLS,
            extra=_device_backends(target, artifact),
            native=_native(target, artifact),
        )
        if gate == "fail":
            agreement.require()
    if any(row.backend == _as_built(target) for row in agreement.rows):
        artifact = replace(artifact, state=EngineState.MEASURED, reason=None)
    return BuiltUnet(artifact, seconds, measured, agreement)


def _native(target: Target, artifact: Artifact) -> str | None:
    """The engine's kind where it runs on this machine's own CPU."""
    ref = EngineRef(artifact.kind, artifact.path.name, artifact.config)
    return ref.kind if target.host_engine(ref) == ref else None


def _as_built(target: Target) -> str:
    """What the built engine is called among the backends."""
    return f"{target.spec.device}, as built"


def _device_backends(target: Target, artifact: Artifact) -> tuple[Backend, ...]:
    """The engine that was built, as one more backend, where its device is in this machine."""
    if not target.device_here():
        return ()

    def opener() -> Engine:
        return open_engine(artifact.kind, artifact.path, artifact.config, artifact.prebuilt)

    return (Backend(_as_built(target), artifact.toolchain, opener, judged=False),)
