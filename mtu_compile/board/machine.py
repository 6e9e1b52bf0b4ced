"""What this machine is: its model, Python and memory, and the devices of vendors that build engines on a board."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtu_compile.bundle import EngineRef
from mtu_compile.bundle.requirements import BoardRequirements
from mtu_compile.core import vendors
from mtu_compile.core.amounts import readable
from mtu_compile.runtime.builder import Builder, Fingerprint, Host, Machine

_MODEL = Path("/proc/device-tree/model")
_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Board:
    """The machine at hand.

    Attributes:
        host: the machine as such.
        machines: by kind of engine, what the vendor that builds it found; the same one for all kinds of a vendor.
    """

    host: Host
    machines: Mapping[str, Machine]

    @property
    def of_vendors(self) -> tuple[Machine, ...]:
        """What each vendor found."""
        return tuple({id(machine): machine for machine in self.machines.values()}.values())

    def fingerprint(self, kind: str) -> Fingerprint:
        """Of engines that are built here; ``ToolchainMissing`` without the library of ``kind``."""
        return self.machines[kind].fingerprint(kind)

    def check(self, target: str, refs: Sequence[EngineRef], requirements: BoardRequirements | None) -> tuple[str, ...]:
        """What every vendor says of the networks it builds; see ``Machine.check``."""
        notes: list[str] = []
        for machine in self.of_vendors:
            if own := [ref for ref in refs if self.machines[ref.kind] is machine]:
                notes += machine.check(target, own, requirements)
        return tuple(notes)

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Name and what was found, for people."""
        rows = [("board", self.host.model or "unknown"), ("Python", self.host.python)]
        rows += [row for machine in self.of_vendors for row in machine.rows()]
        if self.host.available_bytes is not None:
            rows.append(("memory", f"{readable(self.host.available_bytes)} available"))
        return tuple(rows)

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.host.model, "python": self.host.python}
        missing: dict[str, Any] = {}
        for machine in self.of_vendors:
            body.update(machine.to_json())
            missing |= {name: {"reason": e.message, "hint": e.hint} for name, e in machine.missing.items()}
        return {**body, "available_bytes": self.host.available_bytes, "missing": missing}


def probe() -> Board:
    """Ask the machine. Never raises: what cannot be found out is ``None``."""
    host = Host(
        model=_read(_MODEL),
        python=".".join(platform.python_version_tuple()[:2]),
        available_bytes=_available_bytes(),
    )
    kinds = vendors.builders()
    found: dict[str, Machine] = {}
    for place in dict.fromkeys(kinds.values()):
        builder: Builder = vendors.load(place)
        found[place] = builder.probe(host)
    return Board(host, {kind: found[place] for kind, place in kinds.items()})


def _available_bytes() -> int | None:
    for line in (_read(_MEMORY) or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024  # "kB" there are kibibytes
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n ") or None
    except OSError:
        return None
