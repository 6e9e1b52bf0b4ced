"""Samplers in numpy, each equal to its namesake in diffusers.

A scheduler is made for one trajectory (a configuration and a number of steps) and is then asked step by step, by
index. All of them read the configuration diffusers writes to ``scheduler_config.json``, whichever class wrote it, and
take from it what ``from_config`` of their diffusers namesake would take: options that class does not have are ignored,
options it has and the sampler here does not implement are refused.

A sampler is one module of this package: a class with a ``name`` and the ``diffusers_class`` it stands for is found.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from typing import Any

from mtu_compile.core.errors import ConfigError
from mtu_compile.runtime.schedulers.base import Scheduler

__all__ = ["NAMES", "SAMPLERS", "Scheduler", "check", "default_name", "from_config"]


def _found() -> dict[str, type[Scheduler]]:
    """Every sampler of this package by name."""
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    classes = {one for module in modules for one in vars(module).values() if inspect.isclass(one)}
    samplers = [one for one in classes if issubclass(one, Scheduler) and "diffusers_class" in vars(one)]
    return {sampler.name: sampler for sampler in sorted(samplers, key=lambda sampler: sampler.name)}


#: Sampler by the name it is asked for.
SAMPLERS: Mapping[str, type[Scheduler]] = _found()

#: The names a sampler is asked for by.
NAMES: tuple[str, ...] = tuple(SAMPLERS)


def default_name(config: Mapping[str, Any]) -> str:
    """Name of the sampler that wrote ``config``; ``ConfigError`` if it is none of ``NAMES``."""
    written_by = config.get("_class_name")
    for sampler in SAMPLERS.values():
        if sampler.diffusers_class == written_by:
            return sampler.name
    raise ConfigError(
        f"the model's own sampler {written_by!r} is not implemented",
        hint=f"choose another with --scheduler: {', '.join(NAMES)}",
    )


def check(config: Mapping[str, Any], name: str | None = None) -> None:
    """``ConfigError`` unless the sampler exists and implements what ``config`` asks for, whatever the steps."""
    _sampler(config, name).read(config)


def from_config(config: Mapping[str, Any], steps: int, name: str | None = None) -> Scheduler:
    """A scheduler for one trajectory.

    Args:
        config: contents of diffusers' ``scheduler_config.json``.
        steps: number of steps; UNet calls for most samplers.
        name: one of ``NAMES``; ``None`` for the sampler the configuration was written by.

    Raises:
        ConfigError: unknown sampler, unimplemented option, or an impossible number of steps.
    """
    return _sampler(config, name)(config, steps)


def _sampler(config: Mapping[str, Any], name: str | None) -> type[Scheduler]:
    wanted = name or default_name(config)
    if wanted not in SAMPLERS:
        raise ConfigError(f"unknown sampler {wanted!r}", hint=f"choose one of {', '.join(NAMES)}")
    return SAMPLERS[wanted]
