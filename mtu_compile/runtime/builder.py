"""What a vendor builds on the machine its engines run on, behind one small protocol.

TensorRT engines fit one kind of GPU and one version of the library, so a board builds its own. Vendors whose runtime
opens a bundle's graph as it is need nothing of this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mtu_compile.bundle import EngineRef
from mtu_compile.bundle.requirements import BoardRequirements
from mtu_compile.core import vendors
from mtu_compile.core.errors import TargetError
from mtu_compile.core.progress import Advance


@dataclass(frozen=True)
class Host:
    """What any machine is, whatever vendor's device it has.

    Attributes:
        model: the board's name, in the device tree's words; ``None`` where there is none.
        python: "3.10".
        available_bytes: memory programs can still take, by the kernel's estimate; ``None`` where it does not tell.
    """

    model: str | None
    python: str
    available_bytes: int | None


@dataclass(frozen=True)
class Built:
    """An engine that was built.

    Attributes:
        path: its file.
        seconds: what parsing and building took.
        bytes: size of the file.
        toolchain: library and version, as "tensorrt_rtx 1.7.1.116".
    """

    path: Path
    seconds: float
    bytes: int
    toolchain: str


class Fingerprint(Protocol):
    """Device and toolchain an engine is good for: a frozen dataclass, whose fields stand in the index of engines."""

    def foreign(self, kind: str, recipe: Mapping[str, str], here: Any) -> str | None:
        """Why an engine built on this device from ``recipe`` does not belong on ``here``; ``None`` if it does."""
        ...


class Machine(Protocol):
    """What a vendor finds of its own on a machine."""

    @property
    def device(self) -> str:
        """What the vendor's devices are called ("GPU")."""
        ...

    @property
    def free_bytes(self) -> int | None:
        """Memory the device can still take; ``None`` without one."""
        ...

    @property
    def missing(self) -> Mapping[str, TargetError]:
        """Reason by what is missing: a kind of engine, or a part of the machine."""
        ...

    def fingerprint(self, kind: str) -> Fingerprint:
        """Of engines that are built here; ``ToolchainMissing`` without the library of ``kind``."""
        ...

    def check(self, target: str, refs: Sequence[EngineRef], requirements: BoardRequirements | None) -> tuple[str, ...]:
        """Refuse a machine that networks were not made for.

        Args:
            target: the bundle's.
            refs: what would be built, all of the vendor's kinds.
            requirements: the manifest's, which were ``TargetSpec.board_requirements()``; ``None`` where there are none.

        Returns:
            Notes on what is unusual, and stops nothing.

        Raises:
            ToolchainMissing, TargetError: see ``mtu_compile.board.build.build_bundle``.
        """
        ...

    def rows(self) -> tuple[tuple[str, str], ...]:
        """What there is, for people: name and what was found."""
        ...

    def to_json(self) -> dict[str, Any]:
        """The same for programs."""
        ...


class Builder(Protocol):
    """Builds a vendor's engines on the machine at hand; a vendor names it in its ``VENDOR.builders``."""

    @property
    def peak_factor(self) -> float:
        """Peak memory of a build, as a multiple of the graph's size."""
        ...

    @property
    def engine_factor(self) -> float:
        """Size of an engine, as a multiple of its graph's."""
        ...

    def probe(self, host: Host) -> Machine:
        """Ask the machine. Never raises: what is not there is ``Machine.missing``."""
        ...

    def fingerprint(self, kind: str) -> Fingerprint:
        """The device and toolchain at hand.

        Raises:
            ToolchainMissing: the library of ``kind``, or what asks the device, is not installed.
            TargetError: there is no device.
        """
        ...

    def read_fingerprint(self, raw: Mapping[str, Any]) -> Fingerprint:
        """What stands in the index; ``TypeError`` if it is something else."""
        ...

    def build(
        self, graph: Path, out: Path, config: Mapping[str, str], *, kind: str, folder: Path, advance: Advance
    ) -> Built:
        """Build ``graph`` into the engine ``out``, which appears whole or not at all.

        Args:
            config: the ``EngineRef``'s.
            folder: what is worth keeping for the next build goes there.
            advance: told of every step; their number is not known beforehand.

        Raises:
            BuildError, ConfigError, ToolchainMissing, TargetError: the toolchain refused it, or is not here.
        """
        ...


def builder(kind: str) -> Builder:
    """What builds engines of ``kind``; ``KeyError`` if no board builds them."""
    found: Builder = vendors.load(vendors.builders()[kind])
    return found
