"""Turn a pretrained UNet into a multi-task one that starts as the same function."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from mtu_compile.core.atomic import staging
from mtu_compile.core.errors import ModelError
from mtu_compile.core.families import family_of
from mtu_compile.core.hashing import MODEL_SUFFIXES
from mtu_compile.core.schema import read_json
from mtu_compile.core.tasks import Task
from mtu_compile.model.folder import (
    INDEX,
    MODELS,
    ZEROS_FOR_EMPTY,
    check_destination,
    check_folder,
    load_component,
    make_portable,
    silent_libraries,
    zeros_for_empty_prompt,
)
from mtu_compile.model.input_channels import InputChannels, check_tasks, input_channels
from mtu_compile.model.unet import MTUUNet2DConditionModel
from mtu_compile.model.unet_support import check_task, fit_task
from mtu_compile.model.weights import find_weights


def upcycle_unet(
    unet: UNet2DConditionModel, tasks: Sequence[Task], *, channels: InputChannels | None = None, **options: Any
) -> MTUUNet2DConditionModel:
    """Upcycle ``unet``; the result computes the same function, for a sample without condition or with ``unet``'s own.

    Experts are shards of each feed-forward: value and gate half of the GEGLU projection are cut alike, the down
    projection along its input. Down projections are scaled by N and keep the whole output bias, so the uniform mixture
    of a fresh router is the pretrained feed-forward. Condition channels of the input convolutions start at zero, but
    for those the pretrained UNet has itself. Tasks of a latent consistency model are guided by the scale it takes.

    Args:
        unet: the pretrained UNet; it is not changed.
        tasks: what the multi-task UNet will know.
        channels: what its input channels hold; the noisy latent alone if not said.
        options: ``num_experts``, ``d_task``, ``router_width``, ``norm_per_expert``, ``top_k``.

    Raises:
        ModelError: the UNet is multi-task already, not of the Stable Diffusion family, or configured in a way that is
            not carried (key and value are named).
    """
    if isinstance(unet, MTUUNet2DConditionModel):
        raise ModelError("the UNet is multi-task already", hint="upcycle the pretrained UNet it was made from")
    channels = channels or input_channels(unet.config)
    check_tasks(channels, tasks)
    known = inspect.signature(UNet2DConditionModel.__init__).parameters
    base = {key: value for key, value in unet.config.items() if key in known}
    base["in_channels"] = channels.latent
    tasks = [fit_task(task, base) for task in tasks]
    upcycled: MTUUNet2DConditionModel = MTUUNet2DConditionModel(
        tasks=[task.to_json() for task in tasks], **options, **base
    )
    upcycled.to(device=unet.device, dtype=unet.dtype)
    state = upcycled.state_dict()
    state.update(upcycle_state_dict(unet.state_dict(), state, tasks, channels))
    upcycled.load_state_dict(state)
    return upcycled


def upcycle_folder(
    base: Path,
    destination: Path,
    tasks: Sequence[Task],
    *,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    **options: Any,
) -> MTUUNet2DConditionModel:
    """Upcycle the UNet of a diffusers pipeline folder and write an MTU pipeline folder; the rest is copied as it is.

    Args:
        base: a pipeline folder of the SD 1.5, SD 2.x or SDXL anatomy.
        destination: the new folder; it appears whole or not at all.
        tasks: what the multi-task UNet will know.
        dtype: of the written UNet.
        force: replace a model folder that is there.
        options: as for ``upcycle_unet``; ``num_experts`` is the family's (``core.families``) unless it is given.

    Raises:
        ModelError: weights are missing, damaged or pickles, or the UNet cannot be upcycled.
        ConfigError: ``destination`` exists.
    """
    check_destination(destination, force=force)
    listed = check_folder(base)
    if listed["unet"][1] != "UNet2DConditionModel":
        raise ModelError(
            f"the UNet of {base} is multi-task already", hint="upcycle the pretrained pipeline it came from"
        )
    channels, family = check_base(base, tasks), family_of(listed)
    options = {"num_experts": family.experts, **options}
    unet = upcycle_unet(
        load_component(UNet2DConditionModel, base / "unet", dtype=dtype), tasks, channels=channels, **options
    )
    index: dict[str, Any] = {"_class_name": "MTUPipeline", "_diffusers_version": diffusers.__version__, **listed}
    index["unet"] = (MTUUNet2DConditionModel.__module__, MTUUNet2DConditionModel.__name__)
    if family.conditions:
        index[ZEROS_FOR_EMPTY] = zeros_for_empty_prompt(base, family)
    with staging(destination, replace=force, marker=INDEX) as folder:
        with silent_libraries():
            unet.save_pretrained(folder / "unet", safe_serialization=True)
        for component in listed.keys() - {"unet"}:
            shutil.copytree(base / component, folder / component, ignore=_left_out(base, component))
        make_portable(folder)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return unet


def check_base(base: Path, tasks: Sequence[Task]) -> InputChannels:
    """Whether the UNet of a folder that passed ``check_folder`` can be upcycled for ``tasks``; what it takes.

    Raises:
        ModelError: it has a condition that no task has, or none can be told; or wants labels that tasks do not have.
    """
    config, index = read_json(base / "unet" / "config.json"), read_json(base / INDEX)
    channels = input_channels(
        config,
        str(index.get("_class_name")),
        read_json(base / "vae" / "config.json"),
        scaled=bool(index.get("is_cosxl_edit")),
    )
    check_tasks(channels, tasks)
    for task in tasks:
        check_task(fit_task(task, config), config)
    return channels


def _left_out(base: Path, component: str) -> Callable[[str, list[str]], list[str]]:
    """What a copy leaves out: pickles, cards, weights in other precisions, whatever is not weights or config."""
    weights = find_weights(base / component, MODELS[component]) if component in MODELS else None
    kept = {weights.index, *weights.files} if weights else set()

    def ignore(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if (path := Path(folder) / name).is_file() and not wanted(path)]

    def wanted(path: Path) -> bool:
        if ".safetensors" in path.name:
            return path in kept
        return path.suffix in MODEL_SUFFIXES

    return ignore


def upcycle_state_dict(
    base: Mapping[str, Tensor], target: Mapping[str, Tensor], tasks: Sequence[Task], channels: InputChannels
) -> dict[str, Tensor]:
    """Pretrained weights under the names and in the shapes of the multi-task UNet's state dict ``target``."""
    result: dict[str, Tensor] = {}
    for name, value in base.items():
        pieces = dict(_pieces(name, value, target, tasks, channels))
        if unknown := pieces.keys() - target.keys():
            raise ModelError(f"weight {name!r} has no place in the multi-task UNet ({sorted(unknown)[0]})")
        result.update(pieces)
    return result


def _pieces(
    name: str, value: Tensor, target: Mapping[str, Tensor], tasks: Sequence[Task], channels: InputChannels
) -> Iterator[tuple[str, Tensor]]:
    if match := re.fullmatch(r"(.*)\.norm3\.(weight|bias)", name):
        key = f"{match[1]}.ff.norm.{match[2]}"
        yield key, value.expand_as(target[key]).clone()
    elif match := re.fullmatch(r"(.*\.ff)\.net\.(0\.proj|2)\.(weight|bias)", name):
        block, layer, kind = match.groups()
        experts = [f"{block}.experts.{i}.net.{layer}.{kind}" for i in range(_count(target, f"{block}.experts"))]
        yield from zip(experts, _shards(value, layer, kind, len(experts)), strict=True)
    elif match := re.fullmatch(r"conv_in\.(weight|bias)", name):
        for i, task in enumerate(tasks):
            key = f"task_conv_in.convs.{i}.{match[1]}"
            is_weight = match[1] == "weight"
            yield key, channels.weight_for(task, value, target[key]) if is_weight else value.clone()
    else:
        yield name, value


def _shards(value: Tensor, layer: str, kind: str, count: int) -> list[Tensor]:
    """``count`` experts' parts of one tensor of a GEGLU feed-forward."""
    if layer == "0.proj":
        values, gates = (half.chunk(count) for half in value.chunk(2))
        return [torch.cat(pair) for pair in zip(values, gates, strict=True)]
    if kind == "weight":
        return [shard * count for shard in value.chunk(count, dim=1)]
    return [value.clone() for _ in range(count)]


def _count(target: Mapping[str, Tensor], prefix: str) -> int:
    """Number of entries of the module list ``prefix``."""
    indices = {name[len(prefix) + 1 :].split(".")[0] for name in target if name.startswith(f"{prefix}.")}
    return len(indices)
