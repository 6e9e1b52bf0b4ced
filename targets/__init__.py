"""Devices a graph can be built for, by name; one package a vendor."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from mtu_compile.core import vendors
from mtu_compile.core.errors import ConfigError

if TYPE_CHECKING:
    from targets.base import Target as Target


def names() -> tuple[str, ...]:
    """Names of all targets, in the order they are shown."""
    return tuple(vendors.targets())


def get(name: str) -> Target:
    """The target called ``name``; ``ConfigError`` with the closest names otherwise."""
    known = vendors.targets()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5) or list(known)
        raise ConfigError(f"unknown target {name!r}", hint=f"did you mean {' or '.join(close)}?")
    target: Target = vendors.load(known[name])
    return target
