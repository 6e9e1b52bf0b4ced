"""The model and everything that is given with it: read and validated, and refused in the first seconds where wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from calibration import quant_config
from calibration.notices import RowNotice, row_notices
from calibration.quant_settings import QuantSettings
from calibration.samples import split_samples
from calibration.set_folder import load_folder, set_file
from calibration.sets import CAPTURE_HINT
from mtu_compile.core.errors import CalibrationError, ConfigError
from mtu_compile.core.fit import Fit
from mtu_compile.core.hashing import file_sha256, model_sha256
from mtu_compile.core.precision import QUANTISED
from mtu_compile.core.progress import Progress
from mtu_compile.core.seeds import check_seed
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.model.plain import require_multi_task, require_plain
from mtu_compile.model.sampler import check_sampler
from mtu_compile.stages.job import BuildOptions, Checkpoint, Model, QuantRecipe, Rows
from mtu_compile.stages.opened import outline_pipeline
from mtu_compile.steps import Steps
from targets.base import Target

#: Folder of a model that holds the rows it is calibrated and checked with unless others are given.
SAMPLES = "samples"


class ModelOptions(Protocol):
    """Which model, and what of it; the attributes are those of ``BuildOptions``."""

    @property
    def model(self) -> Path: ...
    @property
    def as_task(self) -> str | None: ...
    @property
    def tasks(self) -> tuple[str, ...] | None: ...
    @property
    def size(self) -> tuple[int, int] | None: ...


def check_model(options: ModelOptions) -> Task | None:
    """Refuse in the first second what ``load_model`` refuses after torch was imported; the task of ``as_task``.

    Raises:
        ConfigError: ``as_task`` is no task a plain pipeline can be taken as.
        ModelError: a folder that is damaged or of another kind.
    """
    if options.as_task is None:
        require_multi_task(options.model)
        return None
    return require_plain(options.model, options.as_task)


def check_options(options: BuildOptions, target: Target) -> None:
    """Refuse, before anything is loaded, options that do not go together, or not with the model or the target.

    Raises:
        ConfigError, ModelError: the first that is wrong.
        CalibrationError, InputError: a plain model without data that can be used.
    """
    if options.as_task is not None and options.routing == "shared":
        raise ConfigError(
            "a plain pipeline has one task: there is nothing that tasks could share",
            hint="leave --routing away, or say --routing static",
        )
    if (single := check_model(options)) is not None:
        build_rows(options, [single])
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
    if options.int8_decoder and options.precision != "int8":
        raise ConfigError(
            f"{options.precision} leaves the VAE decoder float", hint="leave --int8-decoder away, or build with --int8"
        )
    check_seed(options.seed)
    check_sampler(options.model, options.sampler, options.steps)


def load_model(options: ModelOptions, *, sampler: str | None = None) -> Model:
    """The float model without its weights, and with ``sampler`` instead of its own.

    Raises:
        ConfigError: an unknown task or sampler, or a size the model cannot make.
        ModelError: a folder that is damaged or of another kind.
    """
    # resolved: steps may be run by somebody who is in another folder
    checkpoint = Checkpoint(options.model.resolve(), model_sha256(options.model), options.as_task)
    pipeline = outline_pipeline(checkpoint, sampler)
    known = pipeline.unet.tasks
    names = dict.fromkeys(options.tasks or (task.name for task in known))
    size = pipeline.resolve_size(*(options.size or (None, None)))
    return Model(checkpoint, pipeline, tuple(find_task(known, name)[1] for name in names), size)


def load_rows(
    model: Path, data: Path | None, tasks: Sequence[Task], *, calibrating: int, checking: int
) -> dict[str, Rows]:
    """By task, rows of the folder ``data`` or else the model's own: so many to calibrate with, so many to check with.

    Raises:
        CalibrationError, InputError: data that cannot be used.
    """
    folder = data or model / SAMPLES
    return {task.name: Rows(*split_samples(folder, task, calibrating=calibrating, checking=checking)) for task in tasks}


def build_rows(options: BuildOptions, tasks: Sequence[Task]) -> dict[str, Rows]:
    """By task, the rows a build calibrates and checks it with."""
    return load_rows(
        options.model,
        options.data,
        tasks,
        calibrating=options.calibration_pictures,
        checking=options.check_pictures,
    )


def note_rows(model: Model, rows: Mapping[str, Rows], fit: Fit, progress: Progress) -> dict[str, tuple[RowNotice, ...]]:
    """By task, what there is to say of its rows; said at once, and given back."""
    notices = {}
    for name, used in rows.items():
        notices[name] = row_notices(
            used.calibrating,
            used.checking,
            tokenizer=model.pipeline.tokenizer,
            size=model.size,
            latent=model.latent_size,
            fit=fit,
        )
        for notice in notices[name]:
            progress.note(str(notice))
    return notices


def given_sets(folder: Path | None, model: Model, steps: Steps, *, decoder: bool) -> dict[str, Path]:
    """Files of the calibration sets in ``folder``, each of this model and fit for its task's graph; none for none.

    Args:
        steps: will be given them.
        decoder: the VAE decoder is quantised with them, too.

    Raises:
        CalibrationError: a task without a set, or a set of another model or shape, or without what the decoder needs.
    """
    if folder is None:
        return {}
    sets = load_folder(folder)
    for task in model.tasks:
        if task.name not in sets:
            raise CalibrationError(
                f"{str(folder)!r} has no calibration set for task {task.name!r}",
                hint=f"it is for {', '.join(sets)}: make it again for all tasks of the build, or say --task",
            )
        shape = (task.unet_batch, model.channels(task), *model.latent_size)
        sets[task.name].verify(task=task.name, model_sha256=model.checkpoint.sha256, shape=shape)
        if decoder and sets[task.name].latents is None:
            raise CalibrationError(
                f"the calibration set for task {task.name!r} has no final latents to quantise the VAE decoder with",
                hint=CAPTURE_HINT,
            )
    files = {task.name: set_file(folder, task.name) for task in model.tasks}
    return {name: steps.know(file, file_sha256(file)) for name, file in files.items()}


def recipes(config: Path | None, tasks: Sequence[Task], *, search: bool) -> Mapping[str, QuantRecipe]:
    """By task, how it is quantised: as the bundle or file ``config`` says, which has to say it for every task.

    Args:
        search: where nothing is given, measure what should stay float.

    Raises:
        ConfigError: a task that ``config`` says nothing of, or a setting that is unknown.
    """
    if config is None:
        return {task.name: QuantRecipe(search=search) for task in tasks}
    settings: dict[str, QuantSettings] = quant_config.load(config)
    if missing := [task.name for task in tasks if task.name not in settings]:
        raise ConfigError(
            f"{config} does not say how to quantise task {missing[0]!r}",
            hint=f"it is for {', '.join(settings)}: add the task, or say --task",
        )
    return {task.name: QuantRecipe(settings[task.name], config.resolve().name) for task in tasks}


def one_recipe(recipes: Mapping[str, QuantRecipe]) -> QuantRecipe:
    """How the one UNet of these tasks is quantised: as each of them is.

    Raises:
        ConfigError: two tasks are to be quantised differently.
    """
    first = next(iter(recipes.values()))
    settings = {name: recipe.settings for name, recipe in recipes.items() if recipe.settings is not None}
    if not settings:
        return first
    return replace(first, settings=quant_config.one_for_all(settings, list(recipes), first.config or "the config"))
