"""Networks whose weights lie in half precision in their files, and that compute in float32.

Read as float32, the weights of SDXL's UNet take 10 GB of memory, and stay in no file. Here they stay mapped from their
file as they are, and a layer's are float32 for as long as the layer runs: the same numbers, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mtu_compile.model.folder import load_component, weights_of
from mtu_compile.model.unet import TaskConvIn
from mtu_compile.model.weights import Weights

#: What is widened, by the names of safetensors.
HALF: Mapping[str, torch.dtype] = {"F16": torch.float16, "BF16": torch.bfloat16}

#: Layers that nobody but themselves reads the weights of.
_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


def load_widened(cls: Any, folder: Path, *, dtype: torch.dtype) -> Any:
    """``folder.load_component`` in float32, whose weights stay in half precision where they are; as it is elsewhere."""
    half = half_of(weights_of(cls, folder)) if dtype == torch.float32 else None
    network = load_component(cls, folder, dtype=half or dtype)
    return widen_on_use(network) if half else network


def half_of(weights: Weights) -> torch.dtype | None:
    """The half precision that all of these weights are in; ``None`` if they are not in one."""
    found: set[str] = set()
    for path in weights.files:
        with safe_open(path, framework="numpy") as file:
            found.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 - not a dict
    found = {name for name in found if "F" in name}  # numbers of positions are integers
    return HALF.get(found.pop()) if len(found) == 1 else None


def widen_on_use(network: nn.Module) -> nn.Module:
    """Let ``network``, whose weights are in half precision, compute in float32; in place.

    Convolutions, linear layers and embeddings are widened while they run, whatever else it has at once: that is small.
    """
    apart = {inner for one in network.modules() if isinstance(one, TaskConvIn) for inner in one.modules()}
    for module in network.modules():
        if isinstance(module, _LAYERS) and module not in apart:
            if any(one.dtype in HALF.values() for one in module.parameters(recurse=False)):
                module.register_forward_pre_hook(_widen)
                module.register_forward_hook(_narrow, always_call=True)
        else:
            for name, one in module.named_parameters(recurse=False):
                if one.dtype in HALF.values():
                    setattr(module, name, _parameter(one.float()))
    return network


def is_widened(network: nn.Module) -> bool:
    """Whether some of its weights are in half precision and it computes in float32 all the same."""
    return any(_widen in module._forward_pre_hooks.values() for module in network.modules())


@contextmanager
def without_content(network: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """While this lasts, widened layers have float32 weights that nobody has written, which takes no memory.

    For whoever wants to know what is computed, but not with what.

    Yields:
        By name of the weight in ``network``, what it is in half precision.
    """
    stored: dict[str, Tensor] = {}
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, module in network.named_modules():
        if _widen not in module._forward_pre_hooks.values():
            continue
        for name, one in list(module.named_parameters(recurse=False)):
            stored[f"{path}.{name}" if path else name] = one.detach()
            places.append((module, name, one))
            setattr(module, name, _parameter(torch.empty(one.shape, dtype=torch.float32)))
    try:
        yield stored
    finally:
        for module, name, one in places:
            setattr(module, name, one)


def _widen(module: Any, arguments: Any) -> None:
    half = {name: one for name, one in module.named_parameters(recurse=False) if one.dtype in HALF.values()}
    if half:
        module._half = half
        for name, one in half.items():
            setattr(module, name, _parameter(one.detach().float()))


def _narrow(module: Any, arguments: Any, output: Any) -> None:
    for name, one in module.__dict__.pop("_half", {}).items():
        setattr(module, name, one)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
