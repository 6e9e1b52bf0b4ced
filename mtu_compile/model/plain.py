"""Plain diffusers pipelines, before upcycling: what they are told. To be refused takes no second: no torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.tasks import Task

#: What a plain pipeline can be compiled as: conditions, guidance and scales are those of diffusers' own pipelines
#: (``StableDiffusionPipeline``, ``StableDiffusionInstructPix2PixPipeline``, ``StableDiffusionInpaintPipeline``, 0.42).
AS_TASKS: Mapping[str, Task] = {
    "t2i": Task("t2i", (), "text", 7.5),
    "edit": Task("edit", ("image",), "text+image", 7.5, 1.5),
    "inpaint": Task("inpaint", ("mask", "masked_image"), "text", 7.5),
}

#: Task by pipeline class, where it is not ``AS_TASKS["t2i"]``: a UNet with a condition, or other scales.
_BY_CLASS: Mapping[str, Task] = {
    "StableDiffusionInstructPix2PixPipeline": AS_TASKS["edit"],
    "StableDiffusionInpaintPipeline": AS_TASKS["inpaint"],
    "StableDiffusionXLPipeline": replace(AS_TASKS["t2i"], guidance_scale=5.0),
    "StableDiffusionXLImg2ImgPipeline": replace(AS_TASKS["t2i"], guidance_scale=5.0),
    "StableDiffusionXLInstructPix2PixPipeline": replace(AS_TASKS["edit"], guidance_scale=5.0),
    "StableDiffusionXLInpaintPipeline": AS_TASKS["inpaint"],
}


def plain_class(folder: Path) -> str | None:
    """Class of the pipeline in ``folder`` if its UNet is a plain one; ``None`` for anything else, a bad folder too."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return str(index.get("_class_name")) if index["unet"][1] == "UNet2DConditionModel" else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def require_multi_task(folder: Path) -> None:
    """``ModelError`` for a plain pipeline: what is missing, and the commands that help."""
    if (kind := plain_class(folder)) is None:
        return
    as_it_is = f"; `--as-task {_task_of(kind).name}` compiles it as it is, for one task"
    raise ModelError(
        f"the UNet of {folder} is not multi-task: it is a plain {kind}, and mtu-compile is for multi-task upcycled "
        "(MTU) UNets, whose feed-forwards are experts that one network shares between tasks",
        hint=f"`mtu-compile upcycle {folder} -o DIR` makes one{as_it_is}",
    )


def require_plain(folder: Path, name: str) -> Task:
    """The task called ``name``, if ``folder`` is a plain pipeline that may be compiled as it.

    Raises:
        ConfigError: an unknown task; a multi-task model; a pipeline for another task.
        ModelError: no pipeline folder.
    """
    if name not in AS_TASKS:
        raise ConfigError(f"a plain pipeline cannot be compiled as {name!r}", hint=f"choose from {', '.join(AS_TASKS)}")
    kind = plain_class(folder)
    if kind is None:
        if (folder / "model_index.json").is_file():
            raise ConfigError(
                f"{folder} is no plain diffusers pipeline",
                hint="leave --as-task away, and choose tasks of a multi-task model with --task",
            )
        raise ModelError(f"{folder} has no model_index.json", hint="give a diffusers pipeline folder")
    fits = _task_of(kind)
    if fits.name != name:
        raise ConfigError(f"{folder} is a {kind}, which does not do {name!r}", hint=f"say --as-task {fits.name}")
    return fits


def _task_of(kind: str) -> Task:
    """What a pipeline of this class does."""
    return _BY_CLASS.get(kind, AS_TASKS["t2i"])
