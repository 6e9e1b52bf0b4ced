"""The float reference's sampler: diffusers' own classes, kept to what the on-board runtime can do as well."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.noise import step_noise
from mtu_compile.core.schema import read_json, show
from mtu_compile.runtime import schedulers

SCHEDULER = "scheduler"
CONFIG = "scheduler_config.json"


def check_sampler(folder: Path, sampler: str | None, steps: int) -> None:
    """Refuse, before anything is loaded, a sampler or steps that the runtime does not have.

    Args:
        folder: a pipeline folder.
        sampler: one of ``schedulers.NAMES``, or ``None`` for the folder's own.
        steps: denoising steps.

    Raises:
        ModelError: the folder's scheduler is not known, or configured as no sampler here can be, naming key and value.
        ConfigError: no such sampler, or impossible steps.
    """
    config = read_config(folder)
    if str(config["_class_name"]).startswith("FlowMatch"):
        raise ModelError(
            f"{folder / SCHEDULER / CONFIG}: {config['_class_name']} is for models of flow matching",
            hint="models that predict noise, velocity or the picture itself can be compiled",
        )
    if sampler is not None and sampler not in schedulers.NAMES:
        raise ConfigError(f"unknown sampler {sampler!r}", hint=f"choose one of {', '.join(schedulers.NAMES)}")
    try:
        schedulers.check(config, sampler)
    except ConfigError as error:
        raise ModelError(f"{folder / SCHEDULER / CONFIG}: {error.message}", hint=error.hint) from error
    schedulers.from_config(config, steps, sampler)


def read_config(folder: Path) -> dict[str, Any]:
    """A pipeline folder's ``scheduler_config.json``, under the class that its index names.

    Raises:
        ModelError: a file is missing or damaged, or does not hold what it should.
    """
    listing, path = folder / "model_index.json", folder / SCHEDULER / CONFIG
    index, config = read_json(listing), read_json(path, infinities=True)
    for file, content in ((listing, index), (path, config)):
        if not isinstance(content, dict):
            raise ModelError(f"{file} is {show(content)}, expected an object", hint="fetch the model again")
    listed = index.get(SCHEDULER)
    if not (isinstance(listed, list) and len(listed) == 2):
        raise ModelError(
            f"{listing}: {SCHEDULER} is {show(listed)}, expected a library and a class", hint="fetch the model again"
        )
    return {**config, "_class_name": listed[1]}


class Sampled(Protocol):
    """A pipeline with a diffusers scheduler."""

    scheduler: Any


def use_sampler(pipeline: Sampled, sampler: str | None) -> None:
    """Give ``pipeline`` the diffusers scheduler of another sampler, made from the configuration of its own.

    What that configuration left out has the new class's own default, as always in diffusers.

    Raises:
        ConfigError: diffusers cannot make the one of the other's configuration.
    """
    import diffusers

    if sampler is None:
        return
    kind = getattr(diffusers, schedulers.SAMPLERS[sampler].diffusers_class)
    try:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"diffusers cannot make the {sampler} sampler of the model's {type(pipeline.scheduler).__name__}: {error}",
            hint="choose another with --scheduler",
        ) from error


def published_config(scheduler: Any) -> dict[str, Any]:
    """What the scheduler was configured with, and nothing it was not: another class has defaults of its own."""
    config = dict(scheduler.config)
    unset = config.get("_use_default_values", ())
    given = {key: value for key, value in config.items() if not key.startswith("_") and key not in unset}
    plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in given.items()}
    return {"_class_name": type(scheduler).__name__, **plain}


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """``scheduler.save_pretrained`` that leaves out what was left out."""
    import diffusers

    folder.mkdir(parents=True, exist_ok=True)
    config = {**published_config(scheduler), "_diffusers_version": diffusers.__version__}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def set_timesteps(scheduler: Any, steps: int, device: Any) -> None:
    """``scheduler.set_timesteps`` for just ``steps`` steps.

    Trailing timesteps are counted in floats by diffusers, which for some numbers (61, 103, 121, …) makes one more, at
    timestep -1: a model was never trained there, and alpha_bar is then read from the wrong end. It is taken out.

    Raises:
        ConfigError: that cannot be done for this scheduler.
    """
    scheduler.set_timesteps(steps, device=device)
    if int(scheduler.timesteps[-1]) >= 0:
        return
    if scheduler.order > 1 or hasattr(scheduler, "order_list"):
        raise ConfigError(
            f"{type(scheduler).__name__} of diffusers counts {steps} trailing steps wrongly",
            hint="take one more or less",
        )
    import torch

    scheduler.timesteps = scheduler.timesteps[:-1]
    if isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])


@contextmanager
def seeded_step(seed: int | None, call: int) -> Iterator[None]:
    """Within the block, diffusers draws ``core.noise.step_noise`` of ``seed`` and ``call``.

    Schedulers take a ``torch.Generator``, whose numbers no board has. ``None`` leaves all as it is.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class SeededNoise(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            if seed is None or func is not torch.randn:
                return func(*args, **given)
            shape = args[0] if args else given["size"]
            return torch.from_numpy(step_noise(seed, call, shape)).to(given.get("device"), given.get("dtype"))

    with SeededNoise():
        yield
