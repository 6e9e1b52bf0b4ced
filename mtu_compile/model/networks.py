"""Whether a config and the weights beside it belong together, found out without reading the weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from mtu_compile.core.errors import ModelError, MtuError, first_line
from mtu_compile.core.schema import read_json
from mtu_compile.model.unet import MTUUNet2DConditionModel
from mtu_compile.model.weights import Weights

#: Class a model component is made of, by the name model_index.json gives it.
CLASSES: dict[str, Any] = {
    one.__name__: one
    for one in (
        UNet2DConditionModel,
        MTUUNet2DConditionModel,
        AutoencoderKL,
        CLIPTextModel,
        CLIPTextModelWithProjection,
    )
}


def check_network(name: str, path: Path, weights: Weights) -> None:
    """Make the network without memory for its weights (half a second for Stable Diffusion's), and count them.

    Args:
        name: of ``CLASSES``.
        path: its ``config.json``, checked by ``configs.check_configs``.
        weights: the files beside it.

    Raises:
        ModelError: values that contradict each other, or weights that are missing or of another shape.
    """
    network = outline(CLASSES[name], path)
    _compare({key: tuple(one.shape) for key, one in network.named_parameters()}, path, weights)


def outline(cls: Any, path: Path) -> Any:
    """The network that its ``config.json`` at ``path`` describes, without memory for its weights.

    Raises:
        ModelError: values that contradict each other.
    """
    config, name = read_json(path), cls.__name__
    try:
        with torch.device("meta"):
            if cls.__module__.startswith("transformers"):
                return cls(CLIPTextConfig.from_dict(config)).eval()
            known = inspect.signature(cls.__init__).parameters
            return cls(**{key: value for key, value in config.items() if key in known}).eval()
    except MtuError as error:
        raise ModelError(f"{path}: {error.message}", hint=error.hint) from error
    except Exception as error:  # whatever a library says to values that it does not expect together
        raise ModelError(
            f"{path}: no {name} can be made of it: {first_line(error)}", hint="fetch or build the model again"
        ) from error


def _compare(wanted: Mapping[str, tuple[int, ...]], path: Path, weights: Weights) -> None:
    """Shapes of the network's weights against the files'. Old files name some in another way, and are as large."""
    hint = "the weights and config.json do not belong together; fetch or build the model again"
    files = f"{weights.files[0].name}{' with the other shards' if weights.index else ''}"
    for key, shape in wanted.items():
        if (found := weights.shapes.get(key, shape)) != shape:
            raise ModelError(f"{path}: weight {key} is {list(found)} in {files}, expected {list(shape)}", hint=hint)
    numbers = sum(math.prod(shape) for shape in wanted.values())
    if numbers > weights.count:
        missing = [key for key in wanted if key not in weights.shapes]
        raise ModelError(
            f"{path} describes a network of {numbers:,} weights, and {files} has {weights.count:,}; "
            f"{len(missing)} are not in it, the first is {missing[0]}",
            hint=hint,
        )
