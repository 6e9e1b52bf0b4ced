"""Everything a report shows, from the manifest, the references and a check that is made now."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import targets
from calibration.shared_scales import bundle_ranges, shared_scales
from mtu_compile import bundle
from mtu_compile.accuracy.host.check import check_bundle
from mtu_compile.accuracy.task_metrics import PictureMetrics
from mtu_compile.accuracy.verdict import CheckResult, TaskCheck
from mtu_compile.bundle import contents
from mtu_compile.bundle.quantisation import CalibrationRecord, MixedRecord
from mtu_compile.core.amounts import readable
from mtu_compile.core.progress import Progress
from mtu_compile.core.version import __version__
from mtu_compile.deploy import figures
from mtu_compile.report.data import Fact, Network, PicturePair, Report, TaskReport
from mtu_compile.report.metrics import label, metric_lines
from mtu_compile.report.routing import compare_forms
from mtu_compile.runtime.reference import Reference
from mtu_compile.stages.job import CAPTURED

_CPUINFO = Path("/proc/cpuinfo")


def gather(path: Path, *, clip: Path | None = None, progress: Progress | None = None) -> Report:
    """Verify the bundle at ``path``, make its pictures again, and collect what is known of it.

    Args:
        path: the bundle's folder.
        clip: folder of a CLIP model to be asked about the pictures, see ``check_bundle``.
        progress: told of every stage.

    Raises:
        ConfigError, ModelError: ``clip`` is no CLIP model that can be read.
        BundleError: the bundle is damaged, or carries no reference for a task.
        AccuracyError: an engine cannot be compared at all; a merely inaccurate one is in the report.
    """
    progress = progress or Progress()
    check = check_bundle(path, clip=clip, everywhere=False, progress=progress)
    with progress.stage("gather"):
        manifest = bundle.read(path, verify=False)  # the check has verified every byte
        target = targets.get(manifest.target)
        networks = tuple(_networks(path, manifest))
        return Report(
            path=path,
            manifest=manifest,
            made_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            made_by=__version__,
            machine=_processor(),
            measured_with=check.measured_with,
            device=target.spec.device,
            device_here=target.device_here(),
            tasks=tuple(_task(path, entry, check.tasks[name]) for name, entry in manifest.tasks.items()),
            networks=networks,
            other_files=_other_files(path, manifest, networks),
            ranges=shared_scales(bundle_ranges(manifest)),
            facts=tuple(_facts(path, manifest, check, target.spec.device)),
            commands=tuple(_commands(path, manifest)),
            forms=compare_forms(path, manifest, networks),
        )


def _task(path: Path, entry: bundle.TaskEntry, check: TaskCheck) -> TaskReport:
    assert entry.reference is not None  # check_bundle refuses a task without one
    reference = Reference.load(bundle.resolve(path, entry.reference))
    calls = iter(check.metrics.steps)
    pictures = tuple(
        PicturePair(
            prompt=one.prompt,
            seed=one.seed,
            source=one.image,
            mask=one.mask,
            truth=one.target,
            reference=one.picture,
            made=made,
            metrics=picture_numbers(measured, wanted=bool(entry.task.condition)),
            calls=tuple(next(calls) for _ in one.inputs),
        )
        for one, made, measured in zip(reference.trajectories, check.made, check.metrics.pictures, strict=True)
    )
    return TaskReport(
        entry=entry,
        metrics=metric_lines(check.summary(), entry.accuracy, check.thresholds),
        thresholds=check.thresholds,
        failures=check.failures,
        pictures=pictures,
        steps=reference.steps,
        producer=reference.producer,
        mixed=read_mixed(entry),
    )


def picture_numbers(measured: PictureMetrics, *, wanted: bool) -> dict[str, float | None]:
    """What is said beside a picture; the rest is in the task's table.

    Args:
        measured: of this picture.
        wanted: whether the data's picture is the one right answer; there is none to words alone.
    """
    numbers = {"PSNR dB": measured.values.get("image_psnr_db"), "SSIM": measured.values.get("ssim")}
    if measured.region is not None:
        where = "in the mask" if measured.region.kind == "mask" else "where edited"
        numbers[f"PSNR {where} dB"] = measured.region.inside_psnr_db
        numbers["PSNR elsewhere dB"] = measured.region.outside_psnr_db
    if wanted and measured.truth is not None:
        numbers["PSNR to the wanted picture dB"] = measured.truth.psnr_db
        numbers["the float original's dB"] = measured.truth.reference_psnr_db
    return numbers


def read_mixed(entry: bundle.TaskEntry) -> MixedRecord | None:
    """What the manifest says of a task's mixed-precision search."""
    quantisation = entry.provenance.quantisation
    return None if quantisation is None else quantisation.mixed


def _networks(path: Path, manifest: bundle.Manifest) -> Iterator[Network]:
    for where, engine in manifest.engines():
        name = _network_name(where)
        files = contents.graph_files(manifest, engine)
        of_tasks = (entry.provenance.build_seconds for entry in manifest.tasks.values() if entry.engine == engine)
        seconds = next(of_tasks, None)  # a UNet that tasks share was built once
        yield Network(name, engine, files, contents.bytes_of(path, files), seconds)


def _other_files(path: Path, manifest: bundle.Manifest, networks: tuple[Network, ...]) -> dict[str, int]:
    """Folder → bytes of the files that belong to no network; small ones together."""
    counted = {file for one in networks for file in one.files}
    shared = contents.shared_weights(manifest)
    sizes: dict[str, int] = {}
    for file in manifest.files:
        if file in counted:
            continue
        folder = file.split("/")[0]
        kind = folder if folder in ("reference", "tokenizer", "tokenizer_2", "wheels") else "configuration"
        kind = "shared weights" if file in shared else kind
        sizes[kind] = sizes.get(kind, 0) + (path / file).stat().st_size
    return sizes


def _board_facts(board: figures.BoardFigures) -> Iterator[Fact]:
    """What one board measured when the bundle was deployed to it."""
    facts, tasks = board.facts, board.measured["tasks"]
    what = ", ".join(str(facts[key]) for key in ("model", "cpu", "system") if facts.get(key))
    drivers = [f"{key} {facts[key]}" for key in ("jetpack", "nvidia_driver", "npu_driver") if facts.get(key)]
    versions = ", ".join([*drivers, *(f"{name} {version}" for name, version in board.versions.items())])
    where = f"on {board.name} ({what}; {versions}), told {board.at}"
    steps = ", ".join(f"{name} {timing['step_ms']:.1f} ms" for name, timing in tasks.items())
    images = ", ".join(f"{name} {timing['image_s']:.2f} s" for name, timing in tasks.items())
    devices = "; ".join(dict.fromkeys(str(timing["device"]) for timing in tasks.values()))
    yield Fact(f"a UNet call on {board.name}: {steps}; a picture: {images}", f"{where}; ran on {devices}", "measured")
    if (peak := board.measured["peak_bytes"]) is not None:
        yield Fact(f"memory on {board.name}: {readable(peak)}", f"{where}; most the check had resident", "measured")
    worst = ", ".join(f"{name} {task['worst_sqnr_db']} dB" for name, task in board.accuracy["tasks"].items())
    verdict = "every task passes" if board.passed else "below a threshold"
    yield Fact(f"accuracy on {board.name}: {verdict}; worst UNet call of {worst}", where, "measured")


def _facts(path: Path, manifest: bundle.Manifest, check: CheckResult, device: str) -> Iterator[Fact]:
    """What is said of several tasks in the same words is one fact."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for topic, name, how, kind in (*_accuracy_facts(manifest, check), *_build_facts(manifest)):
        found.setdefault((topic, how, kind), []).append(name)
    yield Fact("UNet outputs, guidance and pictures of every task", f"now, with {check.measured_with}", "measured")
    for (topic, how, kind), names in found.items():
        yield Fact(f"{topic}: {', '.join(names)}", how, kind)
    for proof in manifest.instruction_sets:
        worst = ", ".join(f"{name} {value:.1f} dB" for name, value in proof.worst_sqnr_db.items())
        imitated = f"imitated by {proof.cpu}" if proof.imitated else proof.cpu
        how = f"at the build, {imitated}: worst UNet call of {worst}" + "".join(f"; {one}" for one in proof.failures)
        yield Fact(f"UNet outputs at instruction set {proof.level}", how, "measured")
    estimates = [
        engine.estimate.source
        for _, engine in manifest.engines()
        if engine.estimate is not None and engine.estimate.latency_ms is not None
    ]
    if estimates:
        yield Fact("latency of the networks", f"the toolchain's own figure: {estimates[0]}", "estimate")
    boards = figures.read(path)
    for one in boards:
        yield from _board_facts(one)
    if not boards:
        yield Fact(f"latency on {device}", "a report times nothing, and no board has", "not measured")
    if (plan := manifest.provenance.plan) is not None:
        yield Fact(f"memory on {device}", plan.method, "estimate")


#: (topic, task or network, how it is known, kind), see ``Fact``.
_Said = tuple[str, str, str, str]


def _accuracy_facts(manifest: bundle.Manifest, check: CheckResult) -> Iterator[_Said]:
    for name, entry in manifest.tasks.items():
        for figure, reason in check.tasks[name].reasons.items():
            said, _, why = reason.partition(": ")
            if said == "not measured":  # what does not apply to a task is no gap
                yield label(figure), name, why, "not measured"
        recorded = entry.accuracy
        if recorded is None:
            yield "accuracy at the build", name, str(entry.accuracy_reason), "not measured"
        else:
            yield "accuracy at the build", name, str(recorded.get("measured_with")), "measured"


def _build_facts(manifest: bundle.Manifest) -> Iterator[_Said]:
    for name, entry in manifest.tasks.items():
        table = entry.provenance.parity
        if table is None:
            yield "agreement of backends", name, "the bundle has no such table", "not measured"
            continue
        ran = ", ".join(f"{row.backend} {row.version}" for row in table.rows)
        yield "agreement of backends", name, f"at the build, on {table.calls} UNet calls: {ran}", "measured"
        for backend, reason in table.not_run.items():
            yield f"agreement of {backend}", name, reason, "not measured"
    for name, entry in manifest.tasks.items():
        if entry.provenance.quantisation is None:
            continue
        mixed = read_mixed(entry)
        if mixed is None:
            yield "sensitivity of the layers", name, "no mixed-precision search ran", "not measured"
            continue
        alone = sum(one.measured for one in mixed.layers)
        how = f"to the first order, on {mixed.calls} UNet calls; {alone} of {len(mixed.layers)} by a run of their own"
        yield "sensitivity of the layers", name, how, "measured" if alone == len(mixed.layers) else "estimate"
        if mixed.costs is None:
            yield "times of the layers", name, "no source of times on the build machine", "not measured"
        else:
            kind = "measured" if mixed.costs.measured else "estimate"
            yield "times of the layers", name, mixed.costs.source, kind
    for name, entry in manifest.tasks.items():
        if (caching := entry.provenance.step_cache) is not None:
            whole = None if entry.step_cache is None else len(entry.step_cache.whole_at)
            said = caching.reason or f"{whole} of {caching.steps}, found on {caching.pictures} pictures"
            yield "whole UNet steps", name, said, "measured"
    for where, engine in manifest.engines():
        kind = "measured" if engine.state.ran else "not measured"
        yield "state at the build", _network_name(where), engine.state_in_words, kind


def _network_name(where: str) -> str:
    """``Manifest.engines``' place of a network → what it is called: its task, or its part of the pipeline."""
    if where.endswith(".step_cache.engine"):
        return f"{where.removeprefix('tasks.').removesuffix('.step_cache.engine')}, shallow"
    if where.startswith("tasks."):
        return where.removeprefix("tasks.").removesuffix(".engine")
    names = {"text.engine": "text encoder", "text_2.engine": "second text encoder", "unet": "UNet of all tasks"}
    names["unet.shallow"] = "shallow UNet of all tasks"
    return names.get(where, where.replace("_", " "))


def _commands(path: Path, manifest: bundle.Manifest) -> Iterator[tuple[str, str]]:
    folder = shlex.quote(path.name or str(path))
    yield (
        "build it (a calibration set of the same hash is the same data; the bundle does not say where that lies)",
        f"mtu-compile build {shlex.quote(manifest.source.name)} {' '.join(_build_options(manifest))} -o {folder}",
    )
    yield "check it, with every timestep as JSON", f"mtu-compile check {folder} --json"
    yield "make this page again", f"mtu-compile report {folder} --force"
    yield "have its numbers as JSON", f"mtu-compile report {folder} --json"


def _build_options(manifest: bundle.Manifest) -> Iterator[str]:
    """What the manifest says of how it was built, as options of ``mtu-compile build``."""
    height, width = manifest.image_size
    entry = next(iter(manifest.tasks.values()))
    yield f"--target {shlex.quote(manifest.target)} --{manifest.precision} --size {width}x{height}"
    yield f"--routing {manifest.routing}"
    yield f"--steps {entry.default_steps}"
    calibration = entry.provenance.calibration or CalibrationRecord()
    if calibration.source not in (None, CAPTURED):
        yield f"--calibration {shlex.quote(calibration.source)}"
    for option, value in (
        ("calibration-pictures", calibration.pictures),
        ("check-pictures", (entry.accuracy or {}).get("pictures")),
        ("seed", calibration.seed),
    ):
        if isinstance(value, int):
            yield f"--{option} {value}"
    if (caching := entry.provenance.step_cache) is not None:
        yield f"--step-cache {caching.most}"
    quantisation = entry.provenance.quantisation
    if quantisation is not None and quantisation.config:
        yield f"--quant-config {shlex.quote(quantisation.config)}"
    elif manifest.precision == "int8" and quantisation is not None and quantisation.mixed is None:
        yield "--no-mixed-precision"
    yield from (f"--task {shlex.quote(name)}" for name in manifest.tasks)


def _processor() -> str:
    """The processor's name, as the kernel or the system says it, and how many of it are used."""
    name = platform.processor() or platform.machine()
    if _CPUINFO.is_file():
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} logical cores, {platform.system()}"
