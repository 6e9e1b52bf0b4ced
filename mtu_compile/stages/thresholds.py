"""The thresholds a build is held to: those given with it, else the model's own; read before anything slow."""

from __future__ import annotations

from pathlib import Path

from mtu_compile.accuracy.threshold_file import THRESHOLDS, Limits, for_tasks, read_thresholds
from mtu_compile.core.errors import ConfigError, ModelError, MtuError
from mtu_compile.core.files import is_inside
from mtu_compile.core.schema import Mismatch, read_json
from mtu_compile.model.unet_config import MTUConfig
from mtu_compile.stages.job import BuildOptions


def asked_thresholds(options: BuildOptions, of: str | None = None) -> Limits:
    """By task of the model, what is asked of it beside the defaults; nothing where neither has a file.

    Args:
        of: what of the file: the build's precision, or ``threshold_file.STEP_CACHE``.

    Raises:
        ConfigError: the file given is none of thresholds, or not for this model.
        ModelError: the same of the model's own, or it lies outside its folder.
    """
    path: Path | None = options.thresholds
    error: type[MtuError] = ConfigError
    if path is None:
        path, error = options.model / THRESHOLDS, ModelError
        if not path.exists() and not path.is_symlink():
            return {}
        if not is_inside(options.model, path):
            raise ModelError(f"{path} points out of {options.model}", hint="copy the file into the folder")
    thresholds = read_thresholds(path, error=error)
    return for_tasks(thresholds, of or options.precision, _task_names(options), path, error=error)


def _task_names(options: BuildOptions) -> tuple[str, ...]:
    if options.as_task is not None:
        return (options.as_task,)
    config = options.model / "unet" / "config.json"
    try:
        return tuple(task.name for task in MTUConfig.from_json(read_json(config, hint="fetch the model again")).tasks)
    except Mismatch as mismatch:
        raise mismatch.at(config, hint="fetch the model again") from mismatch
