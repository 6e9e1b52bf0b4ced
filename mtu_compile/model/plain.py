"""Plain diffusers pipelines, before upcycling: what they are told. To be refused takes no second: no torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

#: What is said of SDXL, whose UNet upcycles, and its hint.
SDXL = "{} is an SDXL pipeline, whose UNet can be compiled but which cannot be run whole yet"
SDXL_HINT = "use a model of the Stable Diffusion 1.5 or 2.x anatomy"

#: Task of the pipelines whose UNet has a condition.
_BY_CLASS = {"StableDiffusionInstructPix2PixPipeline": "edit", "StableDiffusionInpaintPipeline": "inpaint"}


def plain_class(folder: Path) -> str | None:
    """Class of the pipeline in ``folder`` if its UNet is a plain one; ``None`` for anything else, a bad folder too."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return str(index.get("_class_name")) if index["unet"][1] == "UNet2DConditionModel" else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _is_sdxl(folder: Path) -> bool:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    entry = index.get("text_encoder_2")
    return isinstance(entry, list) and entry[:1] != [None]


def require_multi_task(folder: Path) -> None:
    """``ModelError`` for a plain pipeline: what is missing, and the commands that help."""
    if (kind := plain_class(folder)) is None:
        return
    as_it_is = f"; `--as-task {_BY_CLASS.get(kind, 't2i')}` compiles it as it is, for one task"
    raise ModelError(
        f"the UNet of {folder} is not multi-task: it is a plain {kind}, and mtu-compile is for multi-task upcycled "
        "(MTU) UNets, whose feed-forwards are experts that one network shares between tasks",
        hint=f"`mtu-compile upcycle {folder} -o DIR` makes one{'' if _is_sdxl(folder) else as_it_is}",
    )


def require_plain(folder: Path, name: str) -> Task:
    """The task called ``name``, if ``folder`` is a plain pipeline that may be compiled as it.

    Raises:
        ConfigError: an unknown task; a multi-task model; a pipeline for another task.
        ModelError: no pipeline folder; an SDXL pipeline.
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
    if _is_sdxl(folder):
        raise ModelError(SDXL.format(folder), hint=SDXL_HINT)
    fits = _BY_CLASS.get(kind, "t2i")
    if fits != name:
        raise ConfigError(f"{folder} is a {kind}, which does not do {name!r}", hint=f"say --as-task {fits}")
    return AS_TASKS[name]
