"""A step's result as JSON, in which files are named by their place in its folder; and back as the type it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from mtu_compile.core.schema import conform

_FILE = "file in this entry"


def to_json(value: Any, folder: Path) -> Any:
    """``value`` as JSON data.

    Raises:
        TypeError, ValueError: something that JSON cannot give back, or a path outside ``folder``.
    """
    if isinstance(value, Path):
        return {_FILE: value.relative_to(folder).as_posix()}
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_json(getattr(value, one.name), folder) for one in fields(value)}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("keys of a step's result have to be texts")
        return {key: to_json(part, folder) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(part, folder) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a step cannot return a {type(value).__qualname__}")


def from_json(kind: Any, data: Any, folder: Path) -> Any:
    """The inverse of ``to_json``; ``Mismatch`` for what is not of ``kind``."""
    return conform(kind, _with_paths(data, folder))


def _with_paths(data: Any, folder: Path) -> Any:
    if isinstance(data, dict):
        if set(data) == {_FILE}:
            return folder / data[_FILE]
        return {key: _with_paths(part, folder) for key, part in data.items()}
    return [_with_paths(part, folder) for part in data] if isinstance(data, list) else data
