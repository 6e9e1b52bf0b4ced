"""Devices a graph can be built for, by name; one package a vendor."""

from __future__ import annotations

import difflib
from functools import cache
from typing import TYPE_CHECKING

from mtu_compile.core import vendors
from mtu_compile.core.errors import ConfigError

if TYPE_CHECKING:
    from targets.base import Target as Target


def names() -> tuple[str, ...]:
    """Names of all targets, in the order they are shown."""
    return tuple(_by_name())


def get(name: str) -> Target:
    """The target called ``name``; ``ConfigError`` with the closest names otherwise."""
    known = _by_name()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5) or list(known)
        raise ConfigError(f"unknown target {name!r}", hint=f"did you mean {' or '.join(close)}?")
    return known[name]


@cache
def _by_name() -> dict[str, Target]:
    """Every vendor's targets; ``ConfigError`` where two have one name."""
    found: dict[str, Target] = {}
    for place in vendors.targets():
        for target in vendors.load(place):
            name = target.spec.name
            if name in found:
                raise ConfigError(f"two targets are called {name!r}", hint=f"one of them is of {place}")
            found[name] = target
    return found
