"""Devices a graph can be built for, by name.

A device family is one file with its specs; adding a target is a line in ``_TARGETS``.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from mtu_compile.core.errors import ConfigError

if TYPE_CHECKING:
    from targets.base import Target as Target

#: Where each target is defined: ``module:attribute``. Modules are imported when their target is asked for.
_TARGETS: dict[str, str] = {
    "cpu": "targets.cpu:CPU",
    "intel-gpu": "targets.intel_gpu:INTEL_GPU",
    "intel-npu": "targets.intel_npu:INTEL_NPU",
    "intel-npu-3720": "targets.intel_npu:INTEL_NPU_3720",
    "intel-npu-4000": "targets.intel_npu:INTEL_NPU_4000",
    "intel-npu-5010": "targets.intel_npu:INTEL_NPU_5010",
    "jetson-orin": "targets.jetson:JETSON_ORIN",
    "jetson-orin-nx": "targets.jetson:JETSON_ORIN_NX",
    "jetson-orin-nano": "targets.jetson:JETSON_ORIN_NANO",
    "jetson-thor": "targets.jetson:JETSON_THOR",
    "rtx": "targets.tensorrt:RTX",
    "rtx-ampere": "targets.tensorrt:RTX_AMPERE",
    "rtx-ada": "targets.tensorrt:RTX_ADA",
    "rtx-blackwell": "targets.tensorrt:RTX_BLACKWELL",
    "tensorrt": "targets.tensorrt:TENSORRT",
}


def names() -> tuple[str, ...]:
    """Names of all targets, in the order they are shown."""
    return tuple(_TARGETS)


def get(name: str) -> Target:
    """The target called ``name``; ``ConfigError`` with the closest names otherwise."""
    if name not in _TARGETS:
        close = difflib.get_close_matches(name.lower(), _TARGETS, n=3, cutoff=0.5) or list(_TARGETS)
        raise ConfigError(f"unknown target {name!r}", hint=f"did you mean {' or '.join(close)}?")
    module, _, attribute = _TARGETS[name].partition(":")
    target: Target = getattr(importlib.import_module(module), attribute)
    return target
