"""The wheels a board runs a bundle with: those the bundle carries, or what this machine fetches for it.

The board itself fetches nothing. What is fetched here is kept for the next board of its kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from mtu_compile.bundle import Manifest
from mtu_compile.core import vendors
from mtu_compile.core.atomic import scratch
from mtu_compile.core.errors import ConfigError, DeployError, ToolchainMissing
from mtu_compile.core.hashing import file_sha256
from mtu_compile.stages import wheels

#: Folder of wheels in a bundle.
FOLDER = "wheels"
#: What serves a bundle on the board, beside its engines.
SERVE = "serve"


@dataclass(frozen=True)
class System:
    """What decides which wheels fit: CPython ("3.11"), glibc ("2.36") and machine ("aarch64")."""

    python: str
    glibc: str
    machine: str

    @classmethod
    def of(cls, probed: Mapping[str, Any]) -> System:
        """From what ``link.probe`` found; ``DeployError`` where the board has no glibc."""
        if not probed["glibc"]:
            raise DeployError("the board has no glibc, which the packages it needs are built for")
        return cls(".".join(map(str, probed["python"])), str(probed["glibc"]), str(probed["machine"]))

    @classmethod
    def parse(cls, text: str) -> System:
        """``3.11-aarch64-2.36``; ``ConfigError`` for anything else."""
        found = re.fullmatch(r"(3\.\d+)-([a-z0-9_]+)-(\d+\.\d+)", text)
        if found is None:
            raise ConfigError(
                f"{text!r} is no board's Python, machine and glibc",
                hint="python3 -c 'import platform, sys; print(sys.version, platform.machine(), platform.libc_ver())' "
                "tells them there; say 3.11-aarch64-2.36",
            )
        return cls(found[1], found[3], found[2])

    @property
    def platforms(self) -> tuple[str, ...]:
        """Its platform tags."""
        return wheels.manylinux(self.glibc, self.machine)

    def __str__(self) -> str:
        return f"CPython {self.python}, {self.machine}, glibc {self.glibc}"


def extras(manifest: Manifest, python: str) -> tuple[str, ...]:
    """What a bundle's engines need beside our own package, as requirements.

    A Jetson has TensorRT from JetPack, and what goes with it is said in the manifest.
    """
    kinds = {engine.kind for _, engine in manifest.engines()}
    by_kind = {kind: extra for vendor in vendors.vendors() for kind, extra in vendor.extras.items()}
    wanted = [requirement for kind in sorted(kinds) if kind in by_kind for requirement in of_extra(by_kind[kind])]
    board = manifest.provenance.board
    for jetpack in () if board is None else board.jetpack:
        if jetpack.python == python:
            wanted += jetpack.packages
    return tuple(dict.fromkeys((*wanted, *of_extra(SERVE))))


def of_extra(name: str) -> tuple[str, ...]:
    """The requirements of one extra of our own package; ``ConfigError`` if it has no such extra."""
    from packaging.requirements import Requirement

    found = []
    if name not in (distribution(wheels.DISTRIBUTION).metadata.get_all("Provides-Extra") or ()):
        raise ConfigError(
            f"{wheels.DISTRIBUTION} as it is installed here has no extra {name!r}",
            hint="it was installed before there was one: install it again",
        )
    for text in distribution(wheels.DISTRIBUTION).requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": name}) and not marker.evaluate({"extra": ""}):
            found.append(f"{requirement.name}{requirement.specifier}")
    return tuple(found)


def carried(bundle: Path, manifest: Manifest, system: System) -> dict[str, Path] | None:
    """By file name, the wheels a bundle carries for a board; ``None`` if it carries too few."""
    folder = bundle / FOLDER
    listed = {name for name in manifest.files if name.startswith(f"{FOLDER}/") and name.endswith(".whl")}
    if not listed:
        return None
    wanted = (f"{wheels.DISTRIBUTION}", *_base(), *extras(manifest, system.python))
    used, missing = wheels.closure(folder, wanted, system.platforms, system.python)
    return None if missing else {path.name: path for path in used if f"{FOLDER}/{path.name}" in listed}


def fetched(manifest: Manifest, system: System, kept: Path) -> dict[str, Path]:
    """By file name, the wheels for a board, out of ``kept`` or fetched into it; ours is made from what runs here.

    Raises:
        MtuError: a wheel cannot be found or reached.
        ToolchainMissing: there is no pip here, or no ``packaging``.
    """
    try:
        import packaging  # noqa: F401
    except ImportError as error:
        raise ToolchainMissing(
            "wheels for boards are picked by the package packaging, which is not installed",
            hint="pip install 'mtu-compile[compile,deploy]'",
        ) from error
    needed = extras(manifest, system.python)
    folder = kept / f"{system.python}-{system.machine}-{system.glibc}"
    folder.mkdir(parents=True, exist_ok=True)
    used, missing = wheels.closure(folder, (*_base(), *needed), system.platforms, system.python)
    if missing:
        used = set(wheels.fetch_dependencies(folder, system.platforms, system.python, extra=needed))
    return {path.name: path for path in (*used, own_wheel(kept))}


def own_wheel(kept: Path) -> Path:
    """Our own package as it runs here, in a folder of its content: another's stays as it is while it is being sent."""
    kept.mkdir(parents=True, exist_ok=True)
    with scratch("own", beside=kept) as folder:
        made = wheels.write_wheel(folder)
        final = kept / "own" / file_sha256(made) / made.name
        if not final.is_file():
            final.parent.mkdir(parents=True, exist_ok=True)
            made.replace(final)
    return final


def kept_in() -> Path:
    """Where this machine keeps what it fetched for boards."""
    from platformdirs import user_cache_path

    return Path(user_cache_path("mtu-compile")) / "boards"


def hashes(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 by file name."""
    return {name: file_sha256(path) for name, path in sorted(files.items())}


def _base() -> Sequence[str]:
    return [one for one in distribution(wheels.DISTRIBUTION).requires or () if "extra ==" not in one]
