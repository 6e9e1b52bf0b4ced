"""A manifest's dataclasses as plain JSON data; the inverse of ``mtu_compile.core.schema.conform``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from mtu_compile.core.tasks import Task


def encode(value: Any) -> Any:
    """``value`` as JSON has it; infinite and undefined floats become ``"inf"``, ``"-inf"`` and ``"nan"``."""
    if isinstance(value, Task):
        return value.to_json()
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value
