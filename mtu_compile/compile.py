"""The compiler: a multi-task pipeline folder goes in, a checked bundle comes out.

This file is the table of contents. Each stage is a function below; the work is done by the modules they call.
"""

from __future__ import annotations

import gc
import shutil
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
from mtu_compile.layout import Layout
from targets.base import Artifact, Precision, Target

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

Gate = Literal["off", "warn", "fail"]

#: Tools whose version a bundle records.
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "nncf", "openvino", "polygraphy", "numpy")

#: What a UNet is quantised with. Time embedding, first and last convolution cost next to nothing and stay float; with
#: SmoothQuant (0.95, NNCF's default) the emoji example's text-to-image UNet has 26.9 dB SQNR, without 30.6 dB.
INT8 = QuantSettings(
    smooth_quant_alpha=None,
    ignored_scopes=("time_embedding.*", ".*time_emb_proj.*", "conv_in.*", "conv_out.*"),
)

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
class Job:
    """What every stage needs to know.

    Attributes:
        staging: folder that becomes the bundle.
        work: folder for what the bundle does not carry.
        source: the model's name and hash.
        size: height and width of the pictures in pixels.
    """

    options: BuildOptions
    target: Target
    staging: Path
    work: Path
    source: bundle.Source
    size: tuple[int, int]
    progress: Progress


@dataclass(frozen=True)
class Prepared:
    """What is known of one task before a device comes into it.

    Attributes:
        task_id: index of the task in the model.
        task: its description.
        graph: static float ONNX graph.
        passes: what the passes did to it.
        calibration: real UNet inputs, or ``None`` where nothing is quantised.
        reference: file of the float reference.
    """

    task_id: int
    task: Task
    graph: Path
    passes: tuple[bundle.PassRecord, ...]
    calibration: CalibrationSet | None
    reference: Path


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
        with tempfile.TemporaryDirectory(dir=staging.parent, prefix=f"{staging.name}.work-") as work:
            manifest = _compile(options, target, staging, Path(work), progress)
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


def _compile(options: BuildOptions, target: Target, staging: Path, work: Path, progress: Progress) -> bundle.Manifest:
    """All stages from the model to the finished engines."""
    with progress.stage("load"):
        source = bundle.Source(options.model.resolve().name, model_sha256(options.model))
        pipeline = _load(options.model)
        tasks = _select(pipeline, options.tasks)
        size = pipeline.resolve_size(*(options.size or (None, None)))
        samples = [_samples(options, task) for _, task in tasks]
    job = Job(options, target, staging, work, source, size, progress)
    with progress.stage("export"):
        dynamic = _export(pipeline, work)
    prepared = [
        _prepare(job, pipeline, dynamic, task_id, task, calibrating, checking)
        for (task_id, task), (calibrating, checking) in zip(tasks, samples, strict=True)
    ]
    manifest = _parts(job, pipeline)
    layout = Layout.of(pipeline)
    # The float model is not needed any more, and quantising wants the memory.
    del pipeline
    gc.collect()
    entries = {one.task.name: _engine(job, one) for one in prepared}
    layout.write(staging)
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
    job: Job,
    pipeline: MTUPipeline,
    dynamic: Path,
    task_id: int,
    task: Task,
    calibrating: Sequence[Sample],
    checking: Sequence[Sample],
) -> Prepared:
    """Specialise the graph to one task, capture what it will see, and record what the original answers."""
    options, latent_channels = job.options, pipeline.unet.latent_channels
    with job.progress.stage(f"passes {task.name}"):
        graph = job.work / task.name / "model.onnx"
        done = passes.specialise(
            dynamic,
            graph,
            task_id=task_id,
            channels=latent_channels + task.condition_channels(latent_channels),
            batch=task.unet_batch,
            height=job.size[0] // pipeline.vae_scale,
            width=job.size[1] // pipeline.vae_scale,
            text_length=pipeline.tokenizer.model_max_length,
        )
        # Only the records: a result holds the graph.
        records = tuple(bundle.PassRecord(one.id, one.changed, one.rewrites) for one in done)
    captured = None
    if options.precision == "int8":
        with job.progress.stage(f"calibrate {task.name}", len(calibrating)) as advance:
            captured = capture(
                pipeline,
                task,
                calibrating,
                model_sha256=job.source.sha256,
                steps=options.steps,
                size=job.size,
                seed=options.seed,
                progress=advance,
            )
            captured.verify(task=task.name, model_sha256=job.source.sha256)
    with job.progress.stage(f"reference {task.name}", len(checking)) as advance:
        recorded = record_reference(
            pipeline,
            task,
            checking,
            size=job.size,
            steps=options.steps,
            seed=options.seed,
            producer=f"torch {version('torch')}, float32, dynamic routing",
            progress=advance,
        )
        reference = job.staging / "reference" / f"{task.name}.safetensors"
        reference.parent.mkdir(exist_ok=True)
        recorded.save(reference)
    return Prepared(task_id, task, graph, records, captured, reference)


def _parts(job: Job, pipeline: MTUPipeline) -> bundle.Manifest:
    """Text encoder and autoencoder as engines, tokenizer, scheduler, and a manifest that has no tasks yet."""
    from mtu_compile import export

    work, length = job.work, int(pipeline.tokenizer.model_max_length)
    with job.progress.stage("text encoder and autoencoder"):
        graphs = {
            "text_encoder": export.export_text_encoder(pipeline.text_encoder, work / "text_encoder", length),
            "vae_encoder": export.export_vae_encoder(pipeline.vae, work / "vae_encoder", *job.size),
            "vae_decoder": export.export_vae_decoder(pipeline.vae, work / "vae_decoder", *job.size),
        }
        precision = job.target.companion_precision(job.options.precision)
        engines = {
            name: _engine_ref(job, job.target.build(graph, job.staging / name, precision=precision))
            for name, graph in graphs.items()
        }
        pipeline.tokenizer.save_pretrained(job.staging / "tokenizer")
        pipeline.scheduler.save_pretrained(job.staging / "scheduler")
    scheduler = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    pad = int(pipeline.tokenizer.pad_token_id)
    return bundle.Manifest(
        tools={"mtu-compile": __version__, **_versions()},
        source=job.source,
        target=job.options.target,
        precision=job.options.precision,
        image_size=job.size,
        latent_channels=pipeline.unet.latent_channels,
        vae_scale=pipeline.vae_scale,
        scaling_factor=float(pipeline.vae.config.scaling_factor),
        text=bundle.TextPart("tokenizer/tokenizer.json", length, pad, engines["text_encoder"]),
        vae_encoder=engines["vae_encoder"],
        vae_decoder=engines["vae_decoder"],
        scheduler={"_class_name": type(pipeline.scheduler).__name__, **scheduler},
        tasks={},
    )


def _engine(job: Job, one: Prepared) -> bundle.TaskEntry:
    """Quantise one task's graph and build its engine."""
    graph, extra = one.graph, dict[str, object]()
    if one.calibration is not None:
        with job.progress.stage(f"quantise {one.task.name}", len(one.calibration.inputs)) as advance:
            quantised = graph.with_name("int8.onnx")
            report = quantize_onnx(
                graph, one.calibration, quantised, settings=INT8, progress=lambda done, total: advance(1)
            )
            graph, extra["quantisation"] = quantised, report.to_json()
    with job.progress.stage(f"build {one.task.name}"):
        began = time.monotonic()
        plain = one.task.guidance == "text" and not one.task.condition
        folder = job.staging / ("unet" if plain and not (job.staging / "unet").exists() else f"unet_{one.task.name}")
        artifact = job.target.build(graph, folder, precision=job.options.precision)
        extra["build_seconds"] = round(time.monotonic() - began, 1)
    # Graphs are as large as the model: keep no more of them on the disk than needed.
    shutil.rmtree(one.graph.parent)
    return bundle.TaskEntry(
        task=one.task,
        task_id=one.task_id,
        engine=_engine_ref(job, artifact),
        default_steps=job.options.steps,
        passes=one.passes,
        calibration=None if one.calibration is None else one.calibration.sha256,
        accuracy_reason="not checked",
        reference=one.reference.relative_to(job.staging).as_posix(),
        extra=extra,
    )


def _engine_ref(job: Job, artifact: Artifact) -> bundle.EngineRef:
    return bundle.EngineRef(artifact.kind, artifact.path.relative_to(job.staging).as_posix(), artifact.config)


def _versions() -> dict[str, str]:
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found
