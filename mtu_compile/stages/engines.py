"""Engines: text encoder and autoencoder, and the UNets, each compared with the float original where it runs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import passes
from calibration.mixed.effort import LARGE
from mtu_compile.accuracy.host.parity import Backend, Parity, Recorded, parity_of_tasks
from mtu_compile.bundle import EngineRef, EngineState
from mtu_compile.core.tasks import Task
from mtu_compile.graph import io as graph_io
from mtu_compile.runtime.engine import Engine, open_engine
from mtu_compile.runtime.reference import Reference
from mtu_compile.runtime.step_cache import without_deep_feature
from mtu_compile.runtime.task_engine import TaskEngine
from mtu_compile.stages.decoder import DECODER, QuantisedDecoder, int8_decoder
from mtu_compile.stages.half_parts import parts_in_half, unet_in_half
from mtu_compile.stages.job import BuiltUnet, Cut, Gate, Model, Parts, Shallow, Specialised
from mtu_compile.stages.on_target import OnTarget
from mtu_compile.stages.precision import lower
from mtu_compile.steps import Steps, Work, step
from targets.base import Artifact, Precision, Target

#: Recorded UNet calls of each task that a backend is compared on; enough for one trajectory's early, middle and late
#: steps. Of a large network, whose calls take seconds, the first and the last.
PARITY_CALLS, FEW_PARITY_CALLS = 6, 2


#: What runs graphs here, to be compared; the vendors' own are in ``OnTarget``.
TOOLS = ("onnx", "onnx-ir", "onnxruntime", "polygraphy", "numpy")


@dataclass(frozen=True)
class Engineered:
    """An engine, and the seconds that building it took."""

    artifact: Artifact
    seconds: float


def build_parts(
    steps: Steps,
    target: Target,
    precision: Precision,
    model: Model,
    graphs: Mapping[str, Path],
    references: Sequence[Path],
    folder: Path,
    sets: Sequence[Path] = (),
) -> Parts:
    """Text encoder and autoencoder as engines in ``folder``, in the float type that suits a UNet in ``precision``.

    Args:
        model: the float original.
        graphs: by part, its float graph.
        references: float references of all tasks, which tell how large the parts' numbers get.
        sets: calibration sets to quantise the VAE decoder with; none leave it float.

    Raises:
        NotFiniteError: a part overflows float16, and the target has no wider type.
        BuildError: the toolchain refused a graph.
    """
    chosen, here = parts_in_half(steps, target, precision, model, graphs, references), OnTarget.of(target)

    quantised: QuantisedDecoder | None = None
    if sets and chosen[DECODER][0] != target.companion_precision("int8"):
        steps.progress.note("the VAE decoder stays float: its numbers go beyond what is computed in beside INT8")
    elif sets:
        factor = float(model.pipeline.vae.config.scaling_factor)
        call = int8_decoder.of("quantise vae decoder", graphs[DECODER], tuple(sets), tuple(references), factor)
        quantised = steps.run(call)

    def build(steps: Steps, name: str) -> Artifact:
        kind, graph, original = chosen[name][0], graphs[name], None
        label = name.replace("_", " ")
        if name == DECODER and quantised is not None:
            kind, graph, original = "int8", quantised.graph, graph
        lowered, _ = lower(steps, target, graph, kind, label=label, original=original)
        done = steps.run(engine.of(f"build {label}", here, kind, lowered, name, label))
        return _placed(steps, done.artifact, folder / name)

    engines = dict(zip(graphs, steps.each(build, list(graphs)), strict=True))
    ranges = {name: (kind, measured) for name, (kind, measured) in chosen.items() if measured is not None}
    return Parts(engines, ranges, None if quantised is None else quantised.record)


def build_unet(
    steps: Steps,
    target: Target,
    precision: Precision,
    unet: Specialised,
    graph: Path,
    references: Mapping[str, Path],
    folder: Path,
    gate: Gate,
    compiled: Path | None = None,
) -> BuiltUnet:
    """A UNet's lowered ``graph`` as an engine in ``folder``, and what every backend here computes from the graph.

    Args:
        unet: the UNet that ``graph`` was made of.
        references: by task, file of its float reference.
        gate: whether numbers that float16 does not hold, and backends that disagree, fail the build.
        compiled: what is built in the place of ``graph``: the same with one more output.

    Raises:
        NotFiniteError: numbers beyond float16, unless the gate is off.
        BuildError: the toolchain refused the graph.
        AccuracyError: a backend computes something else than the others, and the gate is to fail.
    """
    here, label = OnTarget.of(target), unet.label
    measured = unet_in_half(steps, here, precision, unet, graph, references, judge=gate != "off")
    compiled = _of_target_batch(steps, target, unet, compiled or graph, label)
    built = steps.run(engine.of(f"build {label}", here, precision, compiled, folder.name, label))
    tables = steps.run(compared.of(f"parity {label}", here, unet, graph, references, built.artifact))
    if gate == "fail":
        for table in tables.values():
            table.require()
    artifact = _placed(steps, built.artifact, folder)
    if any(row.backend == _as_built(target) for table in tables.values() for row in table.rows):
        artifact = replace(artifact, state=EngineState.MEASURED, reason=None)
    return BuiltUnet(artifact, built.seconds, measured, tables)


def build_shallow(
    steps: Steps, target: Target, precision: Precision, unet: Specialised, cut: Cut, whole: Path
) -> Shallow:
    """The shallow graph of ``cut`` as an engine, beside the folder of the ``whole`` one's; raises as ``build_unet``."""
    label, folder = f"shallow {unet.label}", whole.with_name(f"{whole.name}_shallow")
    compiled = _of_target_batch(steps, target, unet, cut.shallow, label)
    built = steps.run(engine.of(f"build {label}", OnTarget.of(target), precision, compiled, folder.name, label))
    return Shallow(_placed(steps, built.artifact, folder), cut.share)


def _of_target_batch(steps: Steps, target: Target, unet: Specialised, graph: Path, label: str) -> Path:
    """``graph``, for as many samples as the target compiles where it is for all tasks."""
    if not unet.shared or target.spec.shared_batch is None:
        return graph
    return steps.run(of_batch.of(f"batch {label}", graph, target.spec.shared_batch, label))


@step(tools=TOOLS)
def engine(work: Work, here: OnTarget, precision: Precision, graph: Path, name: str, label: str) -> Engineered:
    """A lowered graph as an engine, in a folder called ``name``; ``label``: what it is, for people."""
    with work.progress.stage(f"build {label}"):
        began = time.monotonic()
        artifact = here.target.build(graph, work.folder / name, precision=precision, progress=work.progress)
        return Engineered(artifact, round(time.monotonic() - began, 1))


@step(tools=TOOLS)
def of_batch(work: Work, graph: Path, batch: int, label: str) -> Path:
    """``graph``, which is for all tasks, for as many samples as the target compiles."""
    frozen = work.folder / f"{graph.stem}-batch-{batch}.onnx"
    with work.progress.stage(f"batch {label}"):
        passes.run_pipeline(graph, frozen, ("mtu::freeze-shapes",), passes.PassContext(batch=batch))
    return frozen


@step(tools=TOOLS, cpu=True)
def compared(
    work: Work, here: OnTarget, unet: Specialised, graph: Path, references: Mapping[str, Path], built: Artifact
) -> Mapping[str, Parity]:
    """By task, what every backend here makes of ``graph``, and the engine ``built`` of it where its device is here."""
    large = graph_io.disk_bytes(unet.graph) // 4 > LARGE
    with work.progress.stage(f"parity {unet.label}"):
        tables = parity_of_tasks(
            graph,
            [
                Recorded(Reference.load(references[task.name]), task.guided, partial(_view, unet, task_id, task))
                for task_id, task in unet.tasks.items()
            ],
            calls=FEW_PARITY_CALLS if large else PARITY_CALLS,
            extra=_device_backends(here.target, built),
            native=_native(here.target, built),
        )
    return {task.name: table for task, table in zip(unet.tasks.values(), tables, strict=True)}


def _placed(steps: Steps, artifact: Artifact, folder: Path) -> Artifact:
    """An engine that is kept, in the bundle's ``folder``."""
    kept = artifact.path.parent
    steps.place(kept, folder)

    def moved(path: Path) -> Path:
        return folder / path.relative_to(kept)

    prebuilt = None if artifact.prebuilt is None else moved(artifact.prebuilt)
    return replace(artifact, path=moved(artifact.path), prebuilt=prebuilt, files=tuple(map(moved, artifact.files)))


def _view(unet: Specialised, task_id: int, task: Task, engine: Engine) -> Engine:
    """An engine of ``unet`` as one of its tasks sees it."""
    engine = without_deep_feature(engine)
    return TaskEngine(engine, task_id, unet.channels[task.name]) if unet.shared else engine


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
