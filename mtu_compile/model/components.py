"""The parts of a multi-task pipeline's folder, each made as the class it is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from mtu_compile.core.errors import ModelError
from mtu_compile.core.families import Family, family_of
from mtu_compile.core.schema import read_json
from mtu_compile.model.autoencoder import fold_statistics
from mtu_compile.model.folder import load_component, outline_component
from mtu_compile.model.networks import CLASSES
from mtu_compile.model.tokenizer import load_tokenizer
from mtu_compile.model.unet import MTUUNet2DConditionModel
from mtu_compile.model.widened import load_widened


def load_components(
    folder: Path,
    listed: Mapping[str, Any],
    given: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    weights: bool,
    widened: bool = False,
) -> dict[str, Any]:
    """By name, every part of a pipeline.

    Args:
        listed: what ``check_folder`` found in ``folder``.
        given: ready-made parts, taken instead of the folder's.
        dtype: of UNet, autoencoder and text encoder.
        weights: read them; without, networks have shapes alone.
        widened: leave weights of half precision mapped from their files (``mtu_compile.model.widened``).

    Raises:
        ModelError: naming what is missing or damaged.
    """
    family, load = family_of(listed), load_component if weights else outline_component
    load_large = load_widened if widened and weights else load
    loaders: dict[str, Callable[[], Any]] = {
        "unet": lambda: load_large(MTUUNet2DConditionModel, folder / "unet", dtype=dtype),
        "vae": lambda: _load_vae(folder / "vae", family, dtype, load),
        "scheduler": lambda: load_scheduler(listed["scheduler"][1], folder / "scheduler"),
    }
    for branch in family.texts:
        loaders |= {
            branch.encoder: partial(load_large, CLASSES[branch.kind], folder / branch.encoder, dtype=dtype),
            branch.tokenizer: partial(load_tokenizer, folder / branch.tokenizer),
        }
    return {name: given[name] if name in given else load() for name, load in loaders.items()}


def _load_vae(folder: Path, family: Family, dtype: torch.dtype, load: Callable[..., Any]) -> AutoencoderKL:
    """The autoencoder; in float32 where float16 does not hold its numbers and its family's pipelines know that."""
    if dtype == torch.float16 and family.upcasts_vae and read_json(folder / "config.json").get("force_upcast", True):
        dtype = torch.float32
    return fold_statistics(load(AutoencoderKL, folder, dtype=dtype))


def load_scheduler(name: str, folder: Path) -> Any:
    """The scheduler of diffusers called ``name`` with the configuration in ``folder``."""
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin)):
        raise ModelError(f"{name!r} is not a scheduler of diffusers {diffusers.__version__}")
    try:
        return cls.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder} cannot be loaded: {error}", hint="fetch the model again") from error
