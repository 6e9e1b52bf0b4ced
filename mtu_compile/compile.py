"""The compiler: a multi-task pipeline folder goes in, a checked bundle comes out.

This file is the table of contents. Each stage is a function below; the work is done by the modules they call, and what
passes between them is in ``mtu_compile.stages.job``.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import passes
import targets
from calibration import mixed, quant_config
from calibration.capture import capture
from calibration.notices import RowNotice, row_notices
from calibration.quantize import QuantSettings
from calibration.record import record_reference
from calibration.samples import Sample, split_samples
from calibration.set_folder import load_folder
from calibration.sets import CalibrationSet
from mtu_compile import bundle
from mtu_compile.accuracy.host.check import check_bundle
from mtu_compile.accuracy.host.half_range import more_precise
from mtu_compile.accuracy.host.parity import Backend, parity
from mtu_compile.accuracy.verdict import CheckResult
from mtu_compile.core.atomic import scratch
from mtu_compile.core.errors import AccuracyError, CalibrationError, ConfigError
from mtu_compile.core.fit import Fit
from mtu_compile.core.hashing import model_sha256
from mtu_compile.core.progress import Progress
from mtu_compile.core.seeds import check_seed
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.core.version import __version__
from mtu_compile.model.plain import load_as_task, require_multi_task, require_plain
from mtu_compile.model.sampler import SCHEDULER, check_sampler, published_config, save_scheduler, use_sampler
from mtu_compile.planner import BuildPlan, HostPlan, plan_build, survey
from mtu_compile.runtime.engine import Engine, open_engine
from mtu_compile.runtime.reference import Reference
from mtu_compile.stages import wheels
from mtu_compile.stages.half_parts import parts_in_half, unet_in_half
from mtu_compile.stages.host_needs import host_needs, with_time
from mtu_compile.stages.job import (
    CAPTURED,
    BuildOptions,
    BuildResult,
    Graphs,
    Job,
    Observed,
    Specialised,
    pass_records,
)
from mtu_compile.stages.layout import Layout, unet_folders
from mtu_compile.stages.precision import COMPRESSED, QUANTISED, compress, lower, quantise
from targets.base import Artifact, Target

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

__all__ = ["BuildOptions", "BuildResult", "build", "export_graphs", "plan"]

#: Tools whose version a bundle records.
TOOLS = (
    *("torch", "diffusers", "transformers", "onnx", "onnxruntime", "nncf", "polygraphy", "numpy"),
    *("openvino", "tensorrt", "tensorrt-rtx-cu13"),
)

#: Recorded UNet calls each backend is compared on; enough for one trajectory's early, middle and late steps.
PARITY_CALLS = 6

#: Folder of a model that holds the rows it is calibrated and checked with unless others are given.
SAMPLES = "samples"


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
    if (single := check_model(options.model, options.as_task)) is not None:
        _samples(options, single)
    target = targets.get(options.target)
    target.spec.check_precision(options.precision)
    if options.calibration is not None and options.precision not in QUANTISED:
        raise ConfigError(
            f"{options.precision} is not calibrated, so a calibration set has no effect",
            hint=f"leave --calibration away, or build with --{QUANTISED[0]}",
        )
    if options.quant_config is not None and options.precision not in QUANTISED:
        raise ConfigError(
            f"{options.precision} is not quantised by a config", hint="leave --quant-config away, or build with --int8"
        )
    check_seed(options.seed)
    check_sampler(options.model, options.sampler, options.steps)
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
                raise AccuracyError("; ".join(checked.failures), hint=_what_to_do(target, manifest, checked))
    return BuildResult(options.output, manifest, checked)


def _what_to_do(target: Target, manifest: bundle.Manifest, checked: CheckResult) -> str:
    """For the tasks that failed: which layers are to blame, and what helps a bundle of this precision."""
    advice = []
    for name, task in checked.tasks.items():
        quantised = manifest.tasks[name].extra.get("quantisation")
        if task.failures and isinstance(quantised, dict) and (blamed := mixed.to_blame(quantised.get("mixed"))):
            advice.append(f"{name} loses most to INT8 in {blamed}: add them to its ignored_scopes in a --quant-config")
    kept = "--accuracy-gate warn keeps the bundle, for `mtu-compile report` to show"
    if manifest.precision in QUANTISED:
        return "; ".join(
            [*advice, "--data with more pictures calibrates better", f"{kept} and --quant-config to start from"]
        )
    finer = more_precise(target.spec, manifest.precision)
    return "; ".join([f"build with {finer}" if finer else "the passes or a backend are to blame", kept])


def _compile(options: BuildOptions, target: Target, staging: Path, work: Path, progress: Progress) -> bundle.Manifest:
    """All stages from the model to the finished engines."""
    with progress.stage("load"):
        pipeline = load_model(options.model, options.as_task)
        source = bundle.Source(options.model.resolve().name, model_sha256(options.model))
        use_sampler(pipeline, options.sampler)
        tasks = select_tasks(pipeline, options.tasks)
        size = pipeline.resolve_size(*(options.size or (None, None)))
        host = host_needs(options, pipeline, [task for _, task in tasks], size)
        host.require()
        samples = [_samples(options, task) for _, task in tasks]
        sets = _given_sets(options, pipeline, tasks, size, source.sha256)
        settings = _given_settings(options, tasks)
    notices = {
        task.name: note_rows(pipeline, rows, size, options.fit, progress)
        for (_, task), rows in zip(tasks, samples, strict=True)
    }
    job = Job(options, target, staging, work, source, size, progress, sets, settings, notices)
    graphs = export_graphs(job, pipeline, tasks)
    planned = _plan(job, graphs, host)
    observed = [_observe(job, pipeline, task, *rows) for (_, task), rows in zip(tasks, samples, strict=True)]
    manifest, ranges = _parts(job, pipeline, graphs, observed)
    layout = Layout.of(pipeline, [task for _, task in tasks])
    folders = unet_folders([task for _, task in tasks])
    # The float model is not needed any more, and quantising wants the memory.
    del pipeline
    gc.collect()
    entries = {
        one.task.name: _engine(job, one, seen, job.staging / folders[one.task.name])
        for one, seen in zip(graphs.tasks.values(), observed, strict=True)
    }
    layout.write(staging)
    extra: dict[str, object] = {"plan": planned.to_json(), "float16_range": ranges}
    if options.as_task is not None:
        extra["as_task"] = options.as_task
    if requirements := target.spec.board_requirements():
        with progress.stage("packages for the board"):
            packed = wheels.pack(staging / "wheels", requirements, fetch=options.fetch_wheels)
            extra["board"] = {**requirements, "wheels": packed}
    return replace(manifest, tasks=entries, extra=extra)


def plan(options: BuildOptions, progress: Progress | None = None) -> BuildPlan:
    """What a build would need of the device's memory; exports and specialises as ``build`` does, and builds nothing.

    Raises:
        ConfigError, ModelError: as ``build``. A model that does not fit is no error here: see ``BuildPlan.require``.
    """
    progress = progress or Progress()
    check_model(options.model, options.as_task)
    target = targets.get(options.target)
    target.spec.check_precision(options.precision)
    with scratch("mtu-plan") as work:
        with progress.stage("load"):
            pipeline = load_model(options.model, options.as_task)
            size = pipeline.resolve_size(*(options.size or (None, None)))
            tasks = select_tasks(pipeline, options.tasks)
            host = host_needs(options, pipeline, [task for _, task in tasks], size)
            host.require_export()
        job = Job(options, target, work, work, bundle.Source(options.model.name, ""), size, progress)
        graphs = export_graphs(job, pipeline, tasks)
        del pipeline
        with progress.stage("plan"):
            unets, parts = graphs.unets, graphs.parts
            found = survey(target, options.precision, unets, parts, dynamic=graphs.dynamic, memory=options.memory)
            return replace(found, host=with_time(host, options, graphs))


def load_model(folder: Path, as_task: str | None = None) -> MTUPipeline:
    """The float pipeline of a folder; of a plain diffusers pipeline with ``as_task``."""
    from mtu_compile.model.pipeline import MTUPipeline

    return MTUPipeline.from_pretrained(folder) if as_task is None else load_as_task(folder, as_task)


def check_model(folder: Path, as_task: str | None) -> Task | None:
    """Refuse in the first second what ``load_model`` refuses after torch was imported; the task of ``as_task``."""
    if as_task is None:
        require_multi_task(folder)
        return None
    return require_plain(folder, as_task)


def select_tasks(pipeline: MTUPipeline, names: Sequence[str] | None) -> list[tuple[int, Task]]:
    """The tasks called ``names``, each once, with their ids; all of them for ``None``. ``ConfigError`` if unknown."""
    known = pipeline.unet.tasks
    return [find_task(known, name) for name in dict.fromkeys(names or (task.name for task in known))]


def _samples(options: BuildOptions, task: Task) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """Rows to calibrate with and rows to check with."""
    folder = options.data or options.model / SAMPLES
    return split_samples(folder, task, calibrating=options.calibration_pictures, checking=options.check_pictures)


def note_rows(
    pipeline: MTUPipeline,
    rows: tuple[Sequence[Sample], Sequence[Sample]],
    size: tuple[int, int],
    fit: Fit,
    progress: Progress,
) -> tuple[RowNotice, ...]:
    """What there is to say of the rows to calibrate with and to check with; said at once, and given back."""
    scale = pipeline.vae_scale
    latent = size[0] // scale, size[1] // scale
    found = row_notices(*rows, tokenizer=pipeline.tokenizer, size=size, latent=latent, fit=fit)
    for notice in found:
        progress.note(str(notice))
    return found


def _given_sets(
    options: BuildOptions, pipeline: MTUPipeline, tasks: Sequence[tuple[int, Task]], size: tuple[int, int], sha256: str
) -> dict[str, CalibrationSet]:
    """The sets of ``options.calibration``, each of this model and fit for its task's graph."""
    if options.calibration is None:
        return {}
    found, latent, scale = load_folder(options.calibration), pipeline.unet.latent_channels, pipeline.vae_scale
    for _, task in tasks:
        if task.name not in found:
            raise CalibrationError(
                f"{str(options.calibration)!r} has no calibration set for task {task.name!r}",
                hint=f"it is for {', '.join(found)}: make it again for all tasks of the build, or say --task",
            )
        shape = (task.unet_batch, latent + task.condition_channels(latent), size[0] // scale, size[1] // scale)
        found[task.name].verify(task=task.name, model_sha256=sha256, shape=shape)
    return found


def _given_settings(options: BuildOptions, tasks: Sequence[tuple[int, Task]]) -> dict[str, QuantSettings]:
    """The settings of ``options.quant_config``, which has to have them for every task."""
    if options.quant_config is None:
        return {}
    found = quant_config.load(options.quant_config)
    if missing := [task.name for _, task in tasks if task.name not in found]:
        raise ConfigError(
            f"{options.quant_config} does not say how to quantise task {missing[0]!r}",
            hint=f"it is for {', '.join(found)}: add the task, or say --task",
        )
    return found


def export_graphs(job: Job, pipeline: MTUPipeline, tasks: Sequence[tuple[int, Task]]) -> Graphs:
    """Export the model once, and specialise the UNet to each of ``tasks`` by the target's passes."""
    from mtu_compile.model import export

    length, work = int(pipeline.tokenizer.model_max_length), job.work
    with job.progress.stage("export"):
        dynamic = export.export_unet(pipeline.unet, work / "dynamic", text_length=length)
        parts = {
            "text_encoder": export.export_text_encoder(pipeline.text_encoder, work / "text_encoder", length),
            "vae_encoder": export.export_vae_encoder(pipeline.vae, work / "vae_encoder", *job.size),
            "vae_decoder": export.export_vae_decoder(pipeline.vae, work / "vae_decoder", *job.size),
        }
        parts = {name: _freeze(graph) for name, graph in parts.items()}
    specialised = {task.name: _specialise(job, pipeline, dynamic, task_id, task) for task_id, task in tasks}
    return Graphs(dynamic, specialised, parts)


def _freeze(graph: Path) -> Path:
    """The graph for one sample; the runtime repeats it where it has more (prompts)."""
    frozen = graph.with_name(f"{graph.stem}-static.onnx")
    passes.run_pipeline(graph, frozen, passes.STATIC_PIPELINE, passes.PassContext(batch=1))
    return frozen


def _specialise(job: Job, pipeline: MTUPipeline, dynamic: Path, task_id: int, task: Task) -> Specialised:
    latent_channels = pipeline.unet.latent_channels
    context = passes.PassContext(
        task_id,
        channels=latent_channels + task.condition_channels(latent_channels),
        batch=task.unet_batch,
        height=job.size[0] // pipeline.vae_scale,
        width=job.size[1] // pipeline.vae_scale,
        text_length=int(pipeline.tokenizer.model_max_length),
    )
    graph = job.work / task.name / "model.onnx"
    with job.progress.stage(f"passes {task.name}"):
        done = passes.run_pipeline(dynamic, graph, job.target.spec.pipeline, context)
    return Specialised(task_id, task, graph, pass_records(done))


def _plan(job: Job, graphs: Graphs, host: HostPlan) -> BuildPlan:
    """Before anything is built: will it fit the device, and does the device's importer take it?"""
    with job.progress.stage("plan"):
        precision, memory = job.options.precision, job.options.memory
        planned = plan_build(job.target, precision, graphs.unets, graphs.parts, dynamic=graphs.dynamic, memory=memory)
        for graph in (*graphs.unets.values(), *graphs.parts.values()):
            job.target.check_graph(graph, precision=precision)
        return replace(planned, host=with_time(host, job.options, graphs))


def _observe(
    job: Job, pipeline: MTUPipeline, task: Task, calibrating: Sequence[Sample], checking: Sequence[Sample]
) -> Observed:
    """Capture what a task's UNet sees while it makes pictures, and record what the original answers."""
    options = job.options
    captured = job.sets.get(task.name)
    if captured is None and options.precision in QUANTISED:
        with job.progress.stage(f"calibrate {task.name}", len(calibrating)) as advance:
            captured = capture(
                pipeline,
                task,
                calibrating,
                model_sha256=job.source.sha256,
                steps=options.steps,
                size=job.size,
                seed=options.seed,
                fit=options.fit,
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
            fit=options.fit,
            producer=f"torch {version('torch')}, float32, dynamic routing",
            progress=advance,
        )
        reference = job.staging / "reference" / f"{task.name}.safetensors"
        reference.parent.mkdir(exist_ok=True)
        recorded.save(reference)
    return Observed(captured, reference)


def _parts(
    job: Job, pipeline: MTUPipeline, graphs: Graphs, observed: Sequence[Observed]
) -> tuple[bundle.Manifest, dict[str, object]]:
    """Text encoder and autoencoder as engines, tokenizer, scheduler, and a manifest that has no tasks yet.

    Also by part how far its numbers go, where its float type could be too small for them.
    """
    with job.progress.stage("text encoder and autoencoder"):
        chosen = parts_in_half(job, pipeline, graphs.parts, [one.reference for one in observed])
        ranges: dict[str, object] = {
            name: {"precision": precision, **found.to_json()}
            for name, (precision, found) in chosen.items()
            if found is not None
        }
        engines = {}
        for name, graph in graphs.parts.items():
            precision, _ = chosen[name]
            lowered, _ = lower(job, graph, precision)
            artifact = job.target.build(lowered, job.staging / name, precision=precision, progress=job.progress)
            engines[name] = _engine_ref(job, artifact)
        pipeline.tokenizer.save_pretrained(job.staging / "tokenizer")
        save_scheduler(pipeline.scheduler, job.staging / SCHEDULER)
    length, pad = int(pipeline.tokenizer.model_max_length), int(pipeline.tokenizer.pad_token_id)
    manifest = bundle.Manifest(
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
        scheduler=published_config(pipeline.scheduler),
        tasks={},
        fit=job.options.fit,
    )
    return manifest, ranges


def _engine(job: Job, one: Specialised, seen: Observed, folder: Path) -> bundle.TaskEntry:
    """Quantise one task's graph, lower it to what the target takes, and build its engine into ``folder``."""
    name, precision = one.task.name, job.options.precision
    graph, extra = one.graph, dict[str, object]()
    if notices := job.notices.get(name):
        extra["notices"] = [notice.to_json() for notice in notices]
    if seen.calibration is not None:
        given = job.options.calibration
        origin = CAPTURED if given is None else given.resolve().name
        extra["calibration"] = {**seen.calibration.describe(), "source": origin}
        graph, extra["quantisation"] = quantise(job, one, seen.calibration)
    if precision in COMPRESSED:
        graph, extra["compression"] = compress(job, one)
    with job.progress.stage(f"lower {name}"):
        graph, lowered = lower(job, graph, precision, original=one.graph)
        reference = Reference.load(seen.reference)
        if (found := unet_in_half(job, name, graph, reference)) is not None:
            extra["float16_range"] = found.to_json()
    with job.progress.stage(f"build {name}"):
        began = time.monotonic()
        artifact = job.target.build(graph, folder, precision=precision, progress=job.progress)
        extra["build_seconds"] = round(time.monotonic() - began, 1)
    with job.progress.stage(f"parity {name}"):
        agreement = parity(
            graph,
            reference,
            guidance=one.task.guided,
            calls=PARITY_CALLS,
            extra=_device_backends(job, artifact),
            for_cpu=job.target.spec.device == "CPU",
        )
        if job.options.gate == "fail":
            agreement.require()
        extra["parity"] = agreement.to_json()
    # Graphs are as large as the model: keep no more of them on the disk than needed.
    shutil.rmtree(one.graph.parent)
    return bundle.TaskEntry(
        task=one.task,
        task_id=one.task_id,
        engine=_engine_ref(job, artifact),
        default_steps=job.options.steps,
        passes=(*one.passes, *lowered),
        calibration=None if seen.calibration is None else seen.calibration.sha256,
        accuracy_reason="not checked",
        reference=seen.reference.relative_to(job.staging).as_posix(),
        extra=extra,
    )


def _device_backends(job: Job, artifact: Artifact) -> tuple[Backend, ...]:
    """The engine that was built, as one more backend, where its device is in this machine."""
    if not job.target.device_here():
        return ()

    def opener() -> Engine:
        return open_engine(artifact.kind, artifact.path, artifact.config, artifact.prebuilt)

    return (Backend(f"{job.target.spec.device}, as built", artifact.toolchain, opener, judged=False),)


def _engine_ref(job: Job, artifact: Artifact) -> bundle.EngineRef:
    return bundle.EngineRef(
        artifact.kind,
        artifact.path.relative_to(job.staging).as_posix(),
        artifact.config,
        None if artifact.prebuilt is None else artifact.prebuilt.relative_to(job.staging).as_posix(),
        artifact.status,
        artifact.estimate,
    )


def _versions() -> dict[str, str]:
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = version(tool)
        except PackageNotFoundError:
            continue
    return found
