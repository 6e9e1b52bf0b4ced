"""The compiler: a multi-task pipeline folder goes in, a checked bundle comes out.

This file is the table of contents: the stages in their order. The work is done in ``mtu_compile.stages``, one file a
stage, and what passes between them is in ``mtu_compile.stages.job``. Whatever takes long is a step, whose result is
kept (``mtu_compile.steps``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import targets
from calibration.notices import RowNotice
from mtu_compile import bundle
from mtu_compile.accuracy.threshold_file import STEP_CACHE, Limits
from mtu_compile.core.errors import MtuError
from mtu_compile.core.precision import QUANTISED
from mtu_compile.core.progress import Progress
from mtu_compile.planner import BuildPlan, HostPlan
from mtu_compile.stages import engines, load, observe, precision, publish, step_cache
from mtu_compile.stages.device_needs import device_needs, require_importable
from mtu_compile.stages.export import export
from mtu_compile.stages.gate import pass_gate
from mtu_compile.stages.host_needs import host_needs
from mtu_compile.stages.job import (
    BuildOptions,
    BuildResult,
    Drawing,
    Model,
    PlanOptions,
    QuantRecipe,
    Rows,
    Specialised,
    Workload,
)
from mtu_compile.stages.layout import Layout, unet_folders
from mtu_compile.stages.opened import let_go
from mtu_compile.stages.running import running
from mtu_compile.stages.share_weights import share_weights
from mtu_compile.stages.specialise import Edit, load_edits, specialise
from mtu_compile.stages.thresholds import asked_thresholds
from mtu_compile.steps import Ran, Steps
from mtu_compile.steps.executors import check_executor
from targets.base import Target

__all__ = ["BuildOptions", "BuildResult", "PlanOptions", "build", "build_all", "plan"]


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
    (outcome,) = build_all([options], progress)
    if isinstance(outcome, MtuError):
        raise outcome
    return outcome


def build_all(options: Sequence[BuildOptions], progress: Progress | None = None) -> list[BuildResult | MtuError]:
    """Compile a model for several targets, which share whatever is the same for them; of each its bundle, or why not.

    Args:
        options: of each target; they differ in ``target`` and ``output`` alone.

    Raises:
        MtuError: as ``build``, for whatever can be refused of any of them before the first is built.
    """
    asked = [_ask(one) for one in options]
    with running(options[0].cache, options[0].output.parent, progress or Progress()) as steps:
        given = _load(asked, steps)
        ready = [_prepare(one, given, steps, only=len(asked) == 1) for one in asked]
        return steps.each(lambda own, one: _build(one, own, last=own.in_turn and one is ready[-1]), ready)


@dataclass(frozen=True)
class _Asked:
    """What is to be built, after what can be refused in the first second was."""

    options: BuildOptions
    target: Target
    edits: Sequence[Edit]
    thresholds: Limits
    cached: Limits


@dataclass(frozen=True)
class _Given:
    """The model and what came with it, the same for every target."""

    model: Model
    host: HostPlan
    rows: Mapping[str, Rows]
    sets: Mapping[str, Path]
    recipes: Mapping[str, QuantRecipe]
    notices: Mapping[str, tuple[RowNotice, ...]]


@dataclass(frozen=True)
class _Prepared:
    """A bundle that will fit its device, before what takes long."""

    asked: _Asked
    given: _Given
    parts: Mapping[str, Path]
    planned: BuildPlan
    unets: Mapping[str, Specialised]
    ran: Sequence[Ran]


def _ask(options: BuildOptions) -> _Asked:
    target = targets.get(options.target)
    load.check_options(options, target)
    check_executor(options.executor)
    edits, thresholds = load_edits(options.passes), asked_thresholds(options)
    cached = {} if options.step_cache is None else asked_thresholds(options, STEP_CACHE)
    target.probe().require(target.spec.name)
    bundle.check_free(options.output, replace=options.force)
    return _Asked(options, target, edits, thresholds, cached)


def _load(asked: Sequence[_Asked], steps: Steps) -> _Given:
    """Read the model and what came with it, and refuse what is wrong with them."""
    options = asked[0].options
    with steps.progress.stage("load"):
        model = load.load_model(options, sampler=options.sampler)
        host = host_needs(model, options.build_memory, ((one.target, one.options.precision) for one in asked))
        host.require()
        rows = load.build_rows(options, model.tasks)
        sets = load.given_sets(options.calibration, model, steps, decoder=options.int8_decoder)
        recipes = load.recipes(options.quant_config, model.tasks, search=options.mixed)
        if options.routing == "shared":
            load.one_recipe(recipes)
    steps.use(options.executor, host.weights_bytes, {model.checkpoint.folder: model.checkpoint.sha256})
    return _Given(model, host, rows, sets, recipes, load.note_rows(model, rows, options.fit, steps.progress))


def _prepare(asked: _Asked, given: _Given, steps: Steps, *, only: bool) -> _Prepared:
    """Export, plan and specialise: whatever is needed to refuse what will not fit, or is not taken; ``only`` this."""
    options, model, progress = asked.options, given.model, steps.progress
    steps.again()
    dynamic, parts = export(steps, model)
    with progress.stage("plan"):
        planned = device_needs(
            asked.target,
            options.precision,
            model,
            steps.intact(dynamic),
            parts,
            routing=options.routing,
            memory=options.memory,
            host=given.host,
            workload=options.workload,
        )
        planned.require()
    progress.tell(planned.routing_in_words())
    unets = specialise(steps, dynamic, model, asked.edits, routing=planned.routing)
    if only:
        steps.release(dynamic)
    if options.step_cache is not None:
        step_cache.require_cut(unets)
    require_importable(steps, asked.target, options.precision, unets, parts)
    return _Prepared(asked, given, parts, planned, unets, steps.ran)


def _build(ready: _Prepared, steps: Steps, *, last: bool) -> BuildResult | MtuError:
    """All that is left, from the specialised graphs to the checked bundle; after the ``last`` nothing is needed."""
    options, target = ready.asked.options, ready.asked.target
    steps.again(ready.ran)
    try:
        with bundle.staging(options.output, replace=options.force) as folder:
            manifest = _compile(ready, steps, folder, last=last)
            with steps.alone():
                written = bundle.write(folder, manifest)
                manifest, checked = pass_gate(folder, written, target, options.gate, steps.progress)
    except MtuError as error:
        return error
    return BuildResult(options.output, manifest, checked, tuple(steps.ran))


def _compile(ready: _Prepared, steps: Steps, folder: Path, *, last: bool) -> bundle.Manifest:
    """The stages up to the engines in ``folder``."""
    options, target = ready.asked.options, ready.asked.target
    given, model = ready.given, ready.given.model
    routing, unets = ready.planned.routing, ready.unets
    recipe_of = {
        name: load.one_recipe({task.name: given.recipes[task.name] for task in unet.tasks.values()})
        for name, unet in unets.items()
    }
    drawing = Drawing(options.steps, options.seed, options.fit, options.sampler)
    quantised = options.precision in QUANTISED
    observed = observe.observe(steps, model, given.rows, drawing, given.sets, quantised=quantised)
    references = [seen.reference for seen in observed.values()]
    caching = step_cache.begin(steps, options.step_cache, model, given.rows, drawing, ready.asked.cached)
    captured = [seen.calibration for seen in observed.values() if seen.calibration is not None]
    parts = engines.build_parts(
        steps,
        target,
        options.precision,
        model,
        ready.parts,
        references,
        folder,
        captured if options.int8_decoder else (),
    )
    if last:
        steps.release(*ready.parts.values())
    source = bundle.Source(options.model.resolve().name, model.checkpoint.sha256)
    manifest = publish.describe_model(model, source, options.target, options.precision, parts, options.fit, folder)
    layout, folders = Layout.of(model.pipeline, model.tasks, routing), unet_folders(model.tasks, routing)
    let_go()

    def build_tasks(steps: Steps, unet: Specialised) -> dict[str, bundle.TaskEntry]:
        tasks = {task_id: task.name for task_id, task in unet.tasks.items()}
        sets = {name: found for name in tasks.values() if (found := observed[name].calibration) is not None}
        lowered = precision.lower_unet(steps, target, options.precision, unet, sets, recipe_of[unet.name])
        cut = None if caching is None else step_cache.cut_unet(steps, lowered, unet.label)
        home = folder / folders[next(iter(tasks.values()))]
        built = engines.build_unet(
            steps,
            target,
            options.precision,
            unet,
            lowered.graph,
            {name: observed[name].reference for name in tasks.values()},
            home,
            options.gate,
            None if cut is None else cut.whole,
        )
        if cut is not None:
            lowered = replace(lowered, passes=(*lowered.passes, *cut.passes))
            built = replace(built, shallow=engines.build_shallow(steps, target, options.precision, unet, cut, home))
        if last:
            steps.release(unet.graph, lowered.graph)
        return {
            name: publish.describe_task(
                unet,
                task_id,
                replace(observed[name], reference=publish.reference(steps, observed[name].reference, folder)),
                lowered,
                built,
                steps=options.steps,
                given_set=options.calibration,
                notices=given.notices[name],
                thresholds=ready.asked.thresholds.get(name),
                folder=folder,
            )
            for task_id, name in tasks.items()
        }

    built = steps.each(build_tasks, list(unets.values()))
    entries = {name: entry for of_unet in built for name, entry in of_unet.items()}
    if caching is not None:
        with steps.alone():
            unchosen = replace(manifest, tasks=entries, routing=routing)
            entries = step_cache.choose(unchosen, caching, target, folder, steps.progress)
    entries, saved = share_weights(target, folder, entries, steps.progress)
    target.publish(folder, layout.index, layout.configs)
    board = publish.pack_for_board(target, folder, steps.progress, fetch=options.fetch_wheels)
    provenance = publish.describe_build(ready.planned, parts, options.as_task, board, saved, steps.ran)
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
    with running(options.cache, Path(tempfile.gettempdir()), progress) as steps:
        with progress.stage("load"):
            model = load.load_model(options)
            host = host_needs(model, options.build_memory, [(target, options.precision)])
            host.require_export()
        dynamic, parts = export(steps, model)
        with progress.stage("plan"):
            return device_needs(
                target,
                options.precision,
                model,
                steps.intact(dynamic),
                parts,
                routing=options.routing,
                memory=options.memory,
                host=host,
                workload=Workload(),
            )
