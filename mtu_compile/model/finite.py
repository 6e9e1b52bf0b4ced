"""Weights that are numbers: a NaN or an Inf in a file is found before anything is made of it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtu_compile.core.errors import ModelError

#: What ``torch.aminmax`` reads as it is; smaller floats (float8) are widened first.
_READ_AS_THEY_ARE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_weights(path: Path) -> None:
    """Read a safetensors file, one tensor in memory at a time.

    Takes as long as reading the file: a second or two for the 3.4 GB of Stable Diffusion 1.5's UNet in float32.

    Raises:
        ModelError: the file is damaged or truncated, or a tensor has NaN or Inf values; names file and tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                if not is_finite(tensor):
                    raise _not_finite(path, name, tensor)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged or truncated: {error}", hint="fetch the file again") from error


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor Inf; one pass, and no copy of it."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype not in _READ_AS_THEY_ARE:
        tensor = tensor.float()
    low, high = tensor.aminmax()  # a NaN comes through
    return math.isfinite(low) and math.isfinite(high)


def _not_finite(path: Path, name: str, tensor: Tensor) -> ModelError:
    wide = tensor.float()
    nans, infs = int(wide.isnan().sum()), int(wide.isinf().sum())
    found = " and ".join(f"{count} {what}" for count, what in ((nans, "NaN"), (infs, "Inf")) if count)
    return ModelError(
        f"{path}: weight {name!r} has {found} among its {tensor.numel()} numbers",
        hint="the file was spoilt when it was trained, converted or copied; fetch or make it again",
    )
