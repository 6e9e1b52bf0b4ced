"""The compiler: a multi-task pipeline folder goes in, a checked bundle comes out.

This file is the table of contents. Each stage is a function below; the work is done by the modules they call.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import passes
import targets
from calibration.capture import capture
from calibration.quantize import QuantSettings, quantize_onnx
from calibration.record import record_reference
from calibration.samples import Sample, load_samples
from calibration.sets import CalibrationSet
from mtu_compile import __version__, bundle
from mtu_compile.check import CheckResult, check_bundle
from mtu_compile.core.errors import AccuracyError, CalibrationError
from mtu_compile.core.hashing import model_sha256
from mtu_compile.core.progress import Progress
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.layout import write_layout
from targets.base import Artifact, Precision, Target

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

Gate = Literal["off", "warn", "fail"]

#: Tools whose version a bundle records.
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "nncf", "openvino", "polygraphy", "numpy")

#: Folder of a model that holds the rows it is calibrated and checked with unless others are given.
SAMPLES = "samples"


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        model: MTU pipeline folder.
        output: bundle folder to write.
        target: name of a target (``mtu-compile targets``).
        precision: ``"int8"``, ``"bf16"`` or ``"fp32"``.
        tasks: names of the tasks to build, or ``None`` for all.
        size: height and width of the pictures in pixels, or ``None`` for the model's own.
        data: folder with prompts and pictures to calibrate and check with, or ``None`` for the model's ``samples/``.
        steps: denoising steps of calibration, check, and the bundle's default.
        calibration_pictures: trajectories calibrated with, per task.
        check_pictures: trajectories the bundle is checked with, per task.
        gate: what a task below its threshold does: ``"fail"`` raises, ``"warn"`` only records.
        seed: of everything random.
        force: replace an existing output.
    """

    model: Path
    output: Path
    target: str = "cpu"
    precision: Precision = "int8"
    tasks: tuple[str, ...] | None = None
    size: tuple[int, int] | None = None
    data: Path | None = None
    steps: int = 20
    calibration_pictures: int = 12
    check_pictures: int = 4
    gate: Gate = "fail"
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class BuildResult:
    """Where the bundle is, what is in it, and how accurate it is (``None`` where the gate is off)."""

    path: Path
    manifest: bundle.Manifest
    check: CheckResult | None


@dataclass(frozen=True)
class Prepared:
    """What is known of one task before a device comes into it.

    Attributes:
        task_id: index of the task in the model.
        task: its description.
        graph: static float ONNX graph.
        passes: what the passes did to it.
        calibration: real UNet inputs, or ``None`` where nothing is quantised.
    """

    task_id: int
    task: Task
    graph: Path
    passes: tuple[passes.PassResult, ...]
    calibration: CalibrationSet | None


def build(options: BuildOptions, progress: Progress | None = None) -> BuildResult:
    """Compile a model into a bundle.

    Raises:
        ConfigError: options that do not fit the model or the target.
        ModelError: a model folder that is damaged or not multi-task.
        CalibrationError: INT8 without usable calibration data.
        TargetError: the toolchain is missing or refused the model.
        AccuracyError: a task is below its threshold; nothing is left at ``options.output``.
    """
    progress = progress or Progress()
    target = targets.get(options.target)
    target.spec.check_precision(options.precision)
    target.probe().require(target.spec.name)
    with bundle.staging(options.output, replace=options.force) as staging:
        with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f"{staging.name}.work-") as scratch:
            manifest = _fill(staging, Path(scratch), target, options, progress)
        manifest = bundle.write(staging, manifest)
        checked = None
        if options.gate != "off":
            checked = check_bundle(staging, progress=progress)
            manifest = bundle.write(staging, checked.recorded_in(manifest))
            if checked.failures and options.gate == "fail":
                raise AccuracyError(
                    "; ".join(checked.failures),
                    hint="--accuracy-gate warn keeps the bundle; --data with more pictures calibrates better",
                )
    return BuildResult(options.output, manifest, checked)


def _fill(staging: Path, work: Path, target: Target, options: BuildOptions, progress: Progress) -> bundle.Manifest:
    """All stages up to the finished engines; ``work`` is for what the bundle does not carry."""
    with progress.stage("load"):
        source = bundle.Source(options.model.resolve().name, model_sha256(options.model))
        pipeline = _load(options.model)
        tasks = _select(pipeline, options.tasks)
        size = pipeline.resolve_size(*(options.size or (None, None)))
        samples = {task.name: _samples(options, task) for _, task in tasks}
    with progress.stage("export"):
        dynamic = _export(pipeline, work)
    prepared = []
    for task_id, task in tasks:
        calibrating, checking = samples[task.name]
        prepared.append(_prepare(pipeline, task_id, task, dynamic, calibrating, size, source, options, work, progress))
        with progress.stage(f"reference {task.name}", len(checking)) as advance:
            reference = record_reference(
                pipeline,
                task,
                checking,
                size=size,
                steps=options.steps,
                seed=options.seed,
                producer=f"torch {version('torch')}, float32, dynamic routing",
                progress=advance,
            )
            (staging / "reference").mkdir(exist_ok=True)
            reference.save(staging / "reference" / f"{task.name}.safetensors")
    manifest = _parts(pipeline, target, size, source, options, staging, work, progress)
    entries = {one.task.name: _engine(one, target, options, staging, work, progress) for one in prepared}
    write_layout(pipeline, staging)
    return replace(manifest, tasks=entries)


def _load(folder: Path) -> MTUPipeline:
    from mtu_compile.model.pipeline import MTUPipeline

    return MTUPipeline.from_pretrained(folder)


def _select(pipeline: MTUPipeline, names: Sequence[str] | None) -> list[tuple[int, Task]]:
    known = pipeline.unet.tasks
    return [find_task(known, name) for name in dict.fromkeys(names or (task.name for task in known))]


def _samples(options: BuildOptions, task: Task) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Rows to calibrate with and rows to check with: those marked ``check``, else every fourth."""
    folder = options.data or options.model / SAMPLES
    if not folder.is_dir():
        raise CalibrationError(
            f"there are no samples for task {task.name!r}: {folder} is not a folder",
            hint="give prompts and pictures with --data DIR (DIR/TASK/metadata.jsonl)",
        )
    rows = load_samples(folder, task)
    if task.guidance != "none" and not all(row.prompt.strip() for row in rows):
        raise CalibrationError(
            f"{folder / task.name} has rows without a prompt, and task {task.name!r} is guided by text",
            hint="give each row a prompt",
        )
    checking = tuple(row for row in rows if row.split == "check") or rows[3::4]
    calibrating = tuple(row for row in rows if row not in checking)
    if not calibrating or not checking:
        raise CalibrationError(
            f"{folder / task.name} has {len(rows)} rows, too few to calibrate and to check with", hint="give 8 or more"
        )
    return calibrating[: options.calibration_pictures], checking[: options.check_pictures]


def _export(pipeline: MTUPipeline, work: Path) -> Path:
    """The UNet as one dynamic graph with the task as an input."""
    from mtu_compile.export import export_unet

    return export_unet(pipeline.unet, work / "dynamic", text_length=pipeline.tokenizer.model_max_length)


def _prepare(
    pipeline: MTUPipeline,
    task_id: int,
    task: Task,
    dynamic: Path,
    samples: Sequence[Sample],
    size: tuple[int, int],
    source: bundle.Source,
    options: BuildOptions,
    work: Path,
    progress: Progress,
) -> Prepared:
    """Specialise the graph to one task, and capture what it will see."""
    with progress.stage(f"passes {task.name}"):
        graph = work / task.name / "model.onnx"
        done = passes.specialise(
            dynamic,
            graph,
            task_id=task_id,
            channels=pipeline.unet.latent_channels + task.condition_channels(pipeline.unet.latent_channels),
            batch=task.unet_batch,
            height=size[0] // pipeline.vae_scale,
            width=size[1] // pipeline.vae_scale,
            text_length=pipeline.tokenizer.model_max_length,
        )
    captured = None
    if options.precision == "int8":
        with progress.stage(f"calibrate {task.name}", len(samples)) as advance:
            captured = capture(
                pipeline,
                task,
                samples,
                model_sha256=source.sha256,
                steps=options.steps,
                size=size,
                seed=options.seed,
                progress=advance,
            )
    return Prepared(task_id, task, graph, done, captured)


def _parts(
    pipeline: MTUPipeline,
    target: Target,
    size: tuple[int, int],
    source: bundle.Source,
    options: BuildOptions,
    staging: Path,
    work: Path,
    progress: Progress,
) -> bundle.Manifest:
    """Text encoder and autoencoder as engines, tokenizer, and a manifest that has no tasks yet."""
    from mtu_compile import export

    length = int(pipeline.tokenizer.model_max_length)
    height, width = size
    with progress.stage("text encoder and autoencoder"):
        graphs = {
            "text_encoder": export.export_text_encoder(pipeline.text_encoder, work / "text_encoder", length),
            "vae_encoder": export.export_vae_encoder(pipeline.vae, work / "vae_encoder", height, width),
            "vae_decoder": export.export_vae_decoder(pipeline.vae, work / "vae_decoder", height, width),
        }
        precision = target.companion_precision(options.precision)
        engines = {
            name: _engine_ref(target.build(graph, staging / name, precision=precision), staging)
            for name, graph in graphs.items()
        }
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    return bundle.Manifest(
        tools={"mtu-compile": __version__, **_versions()},
        source=source,
        target=options.target,
        precision=options.precision,
        image_size=size,
        latent_channels=pipeline.unet.latent_channels,
        vae_scale=pipeline.vae_scale,
        scaling_factor=float(pipeline.vae.config.scaling_factor),
        text=bundle.TextPart(
            "tokenizer/tokenizer.json", length, int(pipeline.tokenizer.pad_token_id), engines["text_encoder"]
        ),
        vae_encoder=engines["vae_encoder"],
        vae_decoder=engines["vae_decoder"],
        scheduler={"_class_name": type(pipeline.scheduler).__name__, **scheduler},
        tasks={},
    )


def _engine(
    one: Prepared, target: Target, options: BuildOptions, staging: Path, work: Path, progress: Progress
) -> bundle.TaskEntry:
    """Quantise one task's graph and build its engine."""
    graph, extra = one.graph, dict[str, object]()
    if one.calibration is not None:
        one.calibration.verify(task=one.task.name, model_sha256=one.calibration.model_sha256)
        with progress.stage(f"quantise {one.task.name}", len(one.calibration.inputs)) as advance:
            quantised = work / f"{one.task.name}-int8" / "model.onnx"
            report = quantize_onnx(
                graph, one.calibration, quantised, settings=QuantSettings(), progress=lambda done, total: advance(1)
            )
            graph, extra["quantisation"] = quantised, report.to_json()
    with progress.stage(f"build {one.task.name}"):
        began = time.monotonic()
        plain = one.task.guidance == "text" and not one.task.condition
        folder = staging / ("unet" if plain and not (staging / "unet").exists() else f"unet_{one.task.name}")
        artifact = target.build(graph, folder, precision=options.precision)
        extra["build_seconds"] = round(time.monotonic() - began, 1)
    return bundle.TaskEntry(
        task=one.task,
        task_id=one.task_id,
        engine=_engine_ref(artifact, staging),
        default_steps=options.steps,
        passes=tuple(bundle.PassRecord(p.id, p.changed, p.rewrites) for p in one.passes),
        calibration=None if one.calibration is None else one.calibration.sha256,
        accuracy_reason="not checked",
        reference=f"reference/{one.task.name}.safetensors",
        extra=extra,
    )


def _engine_ref(artifact: Artifact, staging: Path) -> bundle.EngineRef:
    return bundle.EngineRef(artifact.kind, artifact.path.relative_to(staging).as_posix(), artifact.config)


def _versions() -> dict[str, str]:
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found
