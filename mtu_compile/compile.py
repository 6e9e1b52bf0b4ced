"""The compiler: a multi-task pipeline folder goes in, a checked bundle comes out.

This file is the table of contents: the stages in their order. The work is done in ``mtu_compile.stages``, one file a
stage, and what passes between them is in ``mtu_compile.stages.job``.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import passes
import targets
from mtu_compile import bundle
from mtu_compile.accuracy.threshold_file import Limits
from mtu_compile.core.atomic import scratch
from mtu_compile.core.hashing import model_sha256
from mtu_compile.core.precision import QUANTISED
from mtu_compile.core.progress import Progress
from mtu_compile.planner import BuildPlan
from mtu_compile.stages import engines, export, load, observe, precision, publish
from mtu_compile.stages.device_needs import device_needs, require_importable
from mtu_compile.stages.gate import pass_gate
from mtu_compile.stages.host_needs import host_needs
from mtu_compile.stages.job import BuildOptions, BuildResult, Drawing, PlanOptions, Workload
from mtu_compile.stages.layout import Layout, unet_folders
from mtu_compile.stages.share_weights import share_weights
from mtu_compile.stages.specialise import specialise
from mtu_compile.stages.thresholds import asked_thresholds
from targets.base import Target

__all__ = ["BuildOptions", "BuildResult", "PlanOptions", "build", "plan"]


def build(options: BuildOptions, progress: Progress | None = None) -> BuildResult:
    """Compile a model into a bundle.

    Raises:
        ConfigError: options that do not fit the model or the target.
        ModelError: a model folder that is damaged or not multi-task.
        CalibrationError: INT8 without usable calibration data.
        TargetError: the toolchain is missing or refused the model.
        PassError: the routing cannot be specialised, or a pass of the user's does not hold.
        AccuracyError: a task is below its threshold; nothing is left at ``options.output``.
    """
    progress = progress or Progress()
    target = targets.get(options.target)
    load.check_options(options, target)
    edits = passes.load_passes(options.passes)
    thresholds = asked_thresholds(options)
    target.probe().require(target.spec.name)
    with bundle.staging(options.output, replace=options.force) as folder:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.work-") as work:
            manifest = _compile(options, target, edits, thresholds, folder, Path(work), progress)
        manifest, checked = pass_gate(folder, bundle.write(folder, manifest), target, options.gate, progress)
    return BuildResult(options.output, manifest, checked)


def _compile(
    options: BuildOptions,
    target: Target,
    edits: Sequence[passes.UserPass],
    thresholds: Limits,
    folder: Path,
    work: Path,
    progress: Progress,
) -> bundle.Manifest:
    """All stages from the model to the engines in ``folder``; what the bundle does not carry goes to ``work``."""
    with progress.stage("load"):
        model = load.load_model(options, sampler=options.sampler)
        source = bundle.Source(options.model.resolve().name, model_sha256(options.model))
        host = host_needs(model, options.build_memory)
        host.require()
        rows = load.build_rows(options, model.tasks)
        sets = load.given_sets(options.calibration, model, source.sha256)
        recipes = load.recipes(options.quant_config, model.tasks, search=options.mixed)
        if options.routing == "shared":
            load.one_recipe(recipes)
    notices = load.note_rows(model, rows, options.fit, progress)

    with progress.stage("export"):
        dynamic, part_graphs = export.export_unet(model, work), export.export_parts(model, work)
    with progress.stage("plan"):
        planned = device_needs(
            target,
            options.precision,
            model,
            dynamic,
            part_graphs,
            routing=options.routing,
            memory=options.memory,
            host=host,
            workload=options.workload,
        )
        planned.require()
    progress.tell(planned.routing_in_words())
    routing = planned.routing
    unets = specialise(dynamic, model, work, progress, edits, routing=routing)
    require_importable(target, options.precision, unets, part_graphs)
    recipe_of = {
        name: load.one_recipe({task.name: recipes[task.name] for task in unet.tasks.values()})
        for name, unet in unets.items()
    }

    drawing, quantised = Drawing(options.steps, options.seed, options.fit), options.precision in QUANTISED
    observed = observe.observe(
        model, rows, drawing, sets, source.sha256, folder / "reference", progress, quantised=quantised
    )
    references = [seen.reference for seen in observed.values()]
    parts = engines.build_parts(
        target, options.precision, model, part_graphs, references, folder=folder, work=work, progress=progress
    )
    manifest = publish.describe_model(model, source, options.target, options.precision, parts, options.fit, folder)
    layout, folders = Layout.of(model.pipeline, model.tasks, routing), unet_folders(model.tasks, routing)
    # The float model is not needed any more, and quantising wants the memory.
    del model
    gc.collect()

    entries: dict[str, bundle.TaskEntry] = {}
    for key, unet in unets.items():
        tasks = {task_id: task.name for task_id, task in unet.tasks.items()}
        sets = {name: found for name in tasks.values() if (found := observed[name].calibration) is not None}
        lowered = precision.lower_unet(target, options.precision, unet, sets, recipe_of[key], progress)
        built = engines.build_unet(
            target,
            options.precision,
            unet,
            lowered.graph,
            {name: observed[name].reference for name in tasks.values()},
            folder / folders[next(iter(tasks.values()))],
            options.gate,
            progress,
        )
        # Graphs are as large as the model: keep no more of them on the disk than needed.
        shutil.rmtree(unet.graph.parent)
        for task_id, name in tasks.items():
            entries[name] = publish.describe_task(
                unet,
                task_id,
                observed[name],
                lowered,
                built,
                steps=options.steps,
                given_set=options.calibration,
                notices=notices[name],
                thresholds=thresholds.get(name),
                folder=folder,
            )
    entries, saved = share_weights(target, folder, entries, progress)
    target.publish(folder, layout.index, layout.configs)
    board = publish.pack_for_board(target, folder, progress, fetch=options.fetch_wheels)
    provenance = publish.describe_build(planned, parts, options.as_task, board, saved)
    return replace(manifest, tasks=entries, routing=routing, provenance=provenance)


def plan(options: PlanOptions, progress: Progress | None = None) -> BuildPlan:
    """What a build would need of the device's memory; exports as ``build`` does, and builds nothing.

    Raises:
        ConfigError, ModelError, PassError: as ``build``. A model that does not fit is no error here: see
            ``BuildPlan.require``.
    """
    progress = progress or Progress()
    load.check_model(options)
    target = targets.get(options.target)
    target.spec.check_precision(options.precision)
    with scratch("mtu-plan") as work:
        with progress.stage("load"):
            model = load.load_model(options)
            host = host_needs(model, options.build_memory)
            host.require_export()
        with progress.stage("export"):
            dynamic, parts = export.export_unet(model, work), export.export_parts(model, work)
        with progress.stage("plan"):
            return device_needs(
                target,
                options.precision,
                model,
                dynamic,
                parts,
                routing=options.routing,
                memory=options.memory,
                host=host,
                workload=Workload(),
            )
