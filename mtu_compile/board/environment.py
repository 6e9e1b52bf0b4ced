"""The packages a version runs with: wheels, unpacked into a folder of their own.

A wheel is a zip file whose content belongs into a folder of packages (PEP 427). So nothing is needed that boards may
lack (pip, venv, a compiler, the internet), and nothing of a wheel is run while it is installed. Programs of wheels are
left out: `mtu-compile` has a script of its own, see ``store``. Python's own library alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import stat
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from mtu_compile.board import durable
from mtu_compile.board.store import Store
from mtu_compile.core.errors import BundleError

#: Of a wheel's ``.data`` folder, what belongs into the folder of packages.
_LIBRARIES = ("purelib", "platlib")


def identity(wheels: Mapping[str, str]) -> str:
    """Id of the environment of ``wheels`` (SHA-256 by file name) with this Python."""
    said = {"python": list(sys.version_info[:2]), "wheels": sorted(wheels.values())}
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def install(store: Store, wheels: Mapping[str, str]) -> str:
    """Unpack wheels that have arrived into a new environment; its id. One that is there already is used as it is.

    Raises:
        BundleError: a wheel that is none, or a file in it that would lie elsewhere.
        OSError: no space left on the disk; nothing is left of what was begun.
    """
    name = identity(wheels)
    final = store.environments / name
    if final.is_dir():
        return name
    partial = store.environments / f".{name}.partial"
    durable.remove(partial)
    try:
        (partial / "site").mkdir(parents=True)
        for wheel, sha256 in sorted(wheels.items()):
            _unpack(store.object(sha256), partial / "site", wheel)
        about = {"python": sys.version, "executable": sys.executable, "wheels": dict(sorted(wheels.items()))}
        durable.write(partial / "environment.json", json.dumps(about, indent=2).encode())
        durable.sync_tree(partial)
        durable.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return name


def unpacked_bytes(wheels: Mapping[str, int]) -> int:
    """What wheels of these sizes take on the disk unpacked, estimated: 2.4 to 3.8 times as much, of those we know."""
    return 4 * sum(wheels.values())


def _unpack(wheel: Path, site: Path, name: str) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                place = _place(member, name)
                if place is None:
                    continue
                path = site.joinpath(*place.parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, path.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise BundleError(f"{name} is not a wheel: {error}") from error


def _place(member: zipfile.ZipInfo, wheel: str) -> PurePosixPath | None:
    """Where a file of a wheel goes, below the folder of packages; ``None`` for what is left out."""
    pure = PurePosixPath(member.filename)
    outside = pure.is_absolute() or ".." in pure.parts or "\\" in member.filename or "\0" in member.filename
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise BundleError(f"{wheel} has a file {member.filename!r}, which would lie elsewhere")
    if member.is_dir():
        return None
    if not pure.parts[0].endswith(".data"):
        return pure
    return PurePosixPath(*pure.parts[2:]) if len(pure.parts) > 2 and pure.parts[1] in _LIBRARIES else None
