"""Who makes targets and engines: one package a vendor, each of which says in its ``VENDOR`` what it has.

A vendor is a line in ``VENDORS``, or an entry point of the group ``mtu_compile.vendors`` in a package of its own. What
it has is named by place, and imported when it is asked for: on a board the compilers of other vendors are not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

#: Packages of the vendors that come with this one, in the order their targets are shown.
VENDORS = ("targets.openvino", "targets.npu", "targets.nvidia", "targets.onnxruntime")

GROUP = "mtu_compile.vendors"


@dataclass(frozen=True)
class Vendor:
    """What a vendor's package has, each by its place (``"module:attribute"``).

    Attributes:
        targets: lists of ``targets.base.Target``, one a family of devices; each says its own name.
        engines: by kind, a class that opens a network (``mtu_compile.runtime.engine``).
        builders: by kind, what builds such engines on the board they run on (``mtu_compile.runtime.builder``).
        packages: distributions of the vendor's own, whose versions a bundle records.
        extras: by kind, the extra of our own package that brings what opens such engines; none where a board's own
            system has it.
        backends: what runs graphs on any machine, to be compared with each other (``targets.backend.Offer``).
    """

    targets: tuple[str, ...] = ()
    engines: Mapping[str, str] = field(default_factory=dict)
    builders: Mapping[str, str] = field(default_factory=dict)
    packages: tuple[str, ...] = ()
    extras: Mapping[str, str] = field(default_factory=dict)
    backends: tuple[str, ...] = ()


@cache
def vendors() -> tuple[Vendor, ...]:
    """All vendors: our own first, then those of other packages, by name."""
    others = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    own = (import_module(package).VENDOR for package in VENDORS)
    return (*own, *(entry.load() for entry in others))


def targets() -> tuple[str, ...]:
    """The places of all lists of targets."""
    return tuple(place for vendor in vendors() for place in vendor.targets)


def engines() -> dict[str, str]:
    """By kind, the place of every engine's class."""
    return {kind: place for vendor in vendors() for kind, place in vendor.engines.items()}


def builders() -> dict[str, str]:
    """By kind, the place of what builds its engines on a board; other kinds need no building there."""
    return {kind: place for vendor in vendors() for kind, place in vendor.builders.items()}


def packages() -> tuple[str, ...]:
    """The distributions of all vendors."""
    return tuple(package for vendor in vendors() for package in vendor.packages)


def backends() -> tuple[str, ...]:
    """The places of all that runs graphs on any machine."""
    return tuple(place for vendor in vendors() for place in vendor.backends)


def load(place: str) -> Any:
    """What is at ``"module:attribute"``."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)
