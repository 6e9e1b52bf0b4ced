"""Plain diffusers pipelines, before upcycling: what they are told, and how one is compiled as it is.

Nothing of torch is imported until a pipeline is loaded: to be refused takes no second.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.tasks import Task

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

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


def load_as_task(folder: Path, name: str) -> MTUPipeline:
    """A plain pipeline as a multi-task one with a single task and a single expert: the same function.

    Raises:
        ConfigError, ModelError: as ``require_plain``, and for a pipeline that cannot be upcycled.
    """
    import torch
    from diffusers import UNet2DConditionModel

    from mtu_compile.model.folder import check_folder, load_component
    from mtu_compile.model.pipeline import MTUPipeline
    from mtu_compile.model.upcycle import check_base, upcycle_unet

    task = require_plain(folder, name)
    check_folder(folder)
    channels = check_base(folder, [task])
    plain = load_component(UNet2DConditionModel, folder / "unet", dtype=torch.float32)
    # With one expert there is nothing to route: the router's width does not matter.
    unet = upcycle_unet(plain, [task], channels=channels, num_experts=1, d_task=1, router_width=1).eval()
    del plain  # as large as the new one
    return MTUPipeline.from_pretrained(folder, unet=unet)
