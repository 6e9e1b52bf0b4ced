"""A plain diffusers pipeline, compiled as it is: as a multi-task one with a single task and a single expert."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from mtu_compile.model.folder import check_folder, load_component, outline_component
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.plain import require_plain
from mtu_compile.model.upcycle import check_base, upcycle_unet


def load_as_task(folder: Path, name: str, *, weights: bool = True, tried: bool = False) -> MTUPipeline:
    """The plain pipeline in ``folder`` as the task called ``name``: the same function.

    Args:
        weights, tried: as for ``MTUPipeline.from_pretrained``.

    Raises:
        ConfigError, ModelError: as ``require_plain``, and for a pipeline that cannot be upcycled.
    """
    task = require_plain(folder, name)
    check_folder(folder, tried=tried)
    channels = check_base(folder, [task])
    load = load_component if weights else outline_component
    plain = load(UNet2DConditionModel, folder / "unet", dtype=torch.float32)
    with nullcontext() if weights else torch.device("meta"):
        # With one expert there is nothing to route: the router's width does not matter.
        unet = upcycle_unet(plain, [task], channels=channels, num_experts=1, d_task=1, router_width=1).eval()
    del plain  # as large as the new one
    return MTUPipeline.from_pretrained(folder, unet=unet, weights=weights, tried=True)
