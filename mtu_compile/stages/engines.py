"""Engines: text encoder and autoencoder, and the UNets, each compared with the float original where it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import passes
from mtu_compile.accuracy.host.parity import Backend, Recorded, parity_of_tasks
from mtu_compile.bundle import EngineRef, EngineState
from mtu_compile.core.progress import Progress
from mtu_compile.core.tasks import Task
from mtu_compile.runtime.engine import Engine, open_engine
from mtu_compile.runtime.reference import Reference
from mtu_compile.runtime.task_engine import TaskEngine
from mtu_compile.stages.half_parts import parts_in_half, unet_in_half
from mtu_compile.stages.job import BuiltUnet, Gate, Model, Parts, Specialised
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
    unet: Specialised,
    graph: Path,
    reference_files: Mapping[str, Path],
    folder: Path,
    gate: Gate,
    progress: Progress,
) -> BuiltUnet:
    """A UNet's lowered ``graph`` as an engine in ``folder``, and what every backend here computes from the graph.

    Args:
        unet: the UNet that ``graph`` was made of.
        reference_files: by task, its float reference.
        gate: whether numbers that float16 does not hold, and backends that disagree, fail the build.

    Raises:
        NotFiniteError: numbers beyond float16, unless the gate is off.
        BuildError: the toolchain refused the graph.
        AccuracyError: a backend computes something else than the others, and the gate is to fail.
    """
    references = {task.name: Reference.load(reference_files[task.name]) for task in unet.tasks.values()}
    measured = unet_in_half(target, precision, unet, graph, references, judge=gate != "off")
    with progress.stage(f"build {unet.label}"):
        began = time.monotonic()
        artifact = target.build(_as_compiled(target, unet, graph), folder, precision=precision, progress=progress)
        seconds = round(time.monotonic() - began, 1)
    with progress.stage(f"parity {unet.label}"):
        tables = parity_of_tasks(
            graph,
            [
                Recorded(references[task.name], task.guided, partial(_view, unet, task_id, task))
                for task_id, task in unet.tasks.items()
            ],
            calls=PARITY_CALLS,
            extra=_device_backends(target, artifact),
            native=_native(target, artifact),
        )
        if gate == "fail":
            for table in tables:
                table.require()
    if any(row.backend == _as_built(target) for table in tables for row in table.rows):
        artifact = replace(artifact, state=EngineState.MEASURED, reason=None)
    names = [task.name for task in unet.tasks.values()]
    return BuiltUnet(artifact, seconds, measured, dict(zip(names, tables, strict=True)))


def _view(unet: Specialised, task_id: int, task: Task, engine: Engine) -> Engine:
    """An engine of ``unet`` as one of its tasks sees it."""
    return TaskEngine(engine, task_id, unet.channels[task.name]) if unet.shared else engine


def _as_compiled(target: Target, unet: Specialised, graph: Path) -> Path:
    """``graph`` with the batch that the target compiles where one graph is for all tasks."""
    if not unet.shared or target.spec.shared_batch is None:
        return graph
    frozen = graph.with_name(f"{graph.stem}-batch-{target.spec.shared_batch}.onnx")
    passes.run_pipeline(graph, frozen, ("mtu::freeze-shapes",), passes.PassContext(batch=target.spec.shared_batch))
    return frozen


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
