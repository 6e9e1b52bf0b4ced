"""A target as a step is given it: its name, and whatever decides what it makes on this machine."""

from __future__ import annotations

import inspect
import socket
from dataclasses import dataclass
from pathlib import Path

import targets
from mtu_compile.core import vendors
from mtu_compile.core.errors import TargetError
from mtu_compile.core.hashing import file_sha256
from mtu_compile.steps.key import tool_version
from targets.base import Availability, Target


@dataclass(frozen=True)
class OnTarget:
    """A target on this machine.

    Attributes:
        name: of the target.
        toolchain: what builds for it here.
        device_here: whether its device is in this machine.
        packages: versions of the vendors' own packages.
        source: hash of the module that the target is of, which may be another package's.
    """

    name: str
    toolchain: Availability
    device_here: bool
    packages: tuple[tuple[str, str | None], ...]
    source: str

    @classmethod
    def of(cls, target: Target) -> OnTarget:
        """``target`` as it is here and now."""
        source = file_sha256(Path(inspect.getfile(type(target))))
        packages = tuple((name, tool_version(name)) for name in sorted(set(vendors.packages())))
        return cls(target.spec.name, target.probe(), target.device_here(), packages, source)

    @property
    def target(self) -> Target:
        """The target itself.

        Raises:
            TargetError: its toolchain is another one on this machine than where the build was begun.
        """
        target = targets.get(self.name)
        if (here := OnTarget.of(target)) != self:
            other = ", ".join(name for name in vars(self) if getattr(here, name) != getattr(self, name))
            raise TargetError(
                f"{socket.gethostname()} would build otherwise for {self.name} than this machine: {other} differs",
                hint="workers of a cluster need the toolchains of the machine that builds",
            )
        return target
