"""One kept result: a folder with the files a step wrote, and ``entry.json``, which vouches for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtu_compile.core.errors import MtuError
from mtu_compile.core.files import what_else
from mtu_compile.core.hashing import file_sha256
from mtu_compile.core.schema import conform, read_json
from mtu_compile.steps.key import digest

ENTRY = "entry.json"
FORMAT = "mtu-step-1"


class Damaged(MtuError):
    """A kept result that is not what was kept; it is made again, and nobody hears of it."""


@dataclass(frozen=True)
class KeptFile:
    """A file of an entry: its hash and its size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Entry:
    """A kept result.

    Attributes:
        folder: where it is.
        title: what made it, for people.
        made_of: what its key is the hash of (``key.made_of``).
        files: by path in the folder.
        value: what the step returned (``value.to_json``).
        seconds: what making it took.
        build: what ``Store.build`` was where it was asked for.
    """

    folder: Path
    title: str
    made_of: Mapping[str, Any]
    files: Mapping[str, KeptFile]
    value: Any
    seconds: float
    build: str = ""

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(file.bytes for file in self.files.values())

    def identity(self, path: Path) -> str:
        """What ``path``, a file or folder of this entry, is by its content and the content beside it."""
        inside = path.relative_to(self.folder).as_posix()
        return f"{digest({name: file.sha256 for name, file in self.files.items()})}/{inside}"

    def verify(self) -> None:
        """Read every file; ``Damaged`` if one is not what was written."""
        for name, kept in self.files.items():
            if file_sha256(self.folder / name) != kept.sha256:
                raise Damaged(f"{self.folder / name} has changed")


def write_entry(
    folder: Path, *, title: str, made_of: Mapping[str, Any], value: Any, seconds: float, build: str = ""
) -> None:
    """Make an entry of what is in ``folder``."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    content = {"title": title, "made_of": made_of, "files": files, "value": value, "seconds": round(seconds, 3)}
    content["build"] = build
    sealed = {"format": FORMAT, "sha256": digest(content), **content}
    (folder / ENTRY).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")


def read_entry(folder: Path) -> Entry:
    """The entry in ``folder``: its description is whole, and so are, by their sizes, its files (see ``verify``).

    Raises:
        Damaged: it is not.
    """
    content = read_json(folder / ENTRY, error=Damaged)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise Damaged(f"{folder / ENTRY} is of another version")
    if content.pop("sha256", None) != digest(content):
        raise Damaged(f"{folder / ENTRY} has changed")
    files = conform(Mapping[str, KeptFile], content.pop("files"))
    for name, kept in files.items():
        path = folder / name
        try:
            if ".." in path.parts or what_else(path) is not None or path.stat().st_size != kept.bytes:
                raise Damaged(f"{path} has changed")
        except OSError as error:
            raise Damaged(f"{path} cannot be read: {error}") from error
    return Entry(folder, files=files, **content)
