"""What a board vouches for of ``BUNDLE/built/``: a file beside the bundle's folder, written by what built it.

A bundle's signature cannot cover what a board made of it. So the board's own store says, outside of the folder, which
engines it built there and which kernels their runtime compiled there while they were proven: what is in ``built/`` and
is not on that list, or differs from it, is not run. A bundle that lies elsewhere has no such list, and goes by the
index in ``built/`` alone. Python's own library alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mtu_compile.bundle.manifest import BUILT
from mtu_compile.core.errors import BundleError
from mtu_compile.core.hashing import file_sha256

#: Beside the bundle's folder, so that nothing that writes into it writes this.
FILE = "built.json"
FORMAT = "mtu-vouched-1"
_ENGINE = ".engine"
#: What is run of ``built/``: engines, and what OpenVINO keeps of its compilations, which can be thrown away.
_RUN = (_ENGINE, ".blob", ".cl_cache")


def read(root: Path) -> Mapping[str, str] | None:
    """SHA-256 by path relative to the bundle at ``root``; ``None`` where no board vouches for anything.

    Raises:
        BundleError: the list is damaged.
    """
    path = root.resolve().parent / FILE
    if not path.exists() and not path.is_symlink():
        return None
    try:
        body = json.loads(path.read_bytes())
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r}")
        files: dict[str, str] = body["files"]
        if not all(isinstance(one, str) for pair in files.items() for one in pair):
            raise ValueError("something in it is no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path.name} beside the bundle is damaged: {error}", hint="deploy it again") from error
    return files


def to_bytes(files: Mapping[str, str]) -> bytes:
    """The file's content."""
    return json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=2).encode() + b"\n"


def there(root: Path) -> dict[str, Path]:
    """By relative path, what ``built/`` has that is run; links, which nothing here makes, are told, too."""
    folder = root / BUILT
    found = folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ()
    return {f"{BUILT}/{path.name}": path for path in found if path.suffix in _RUN}


def foreign(root: Path) -> tuple[Path, ...]:
    """What ``built/`` has that the board does not vouch for; nothing where it vouches for nothing at all."""
    known = read(root)
    if known is None:
        return ()
    return tuple(path for name, path in there(root).items() if not _is(path, known.get(name)))


def problem(root: Path) -> str | None:
    """Which engine is not what the board vouches for, and why; ``None`` if all are, to the byte."""
    known = read(root)
    if known is None:
        return None
    present = there(root)
    for name in sorted(one for one in known if one.endswith(_ENGINE)):
        if name not in present:
            return f"{name} is missing"
        if not _is(present[name], known[name]):
            return f"{name} is not the file that this board built"
    return None


def _is(path: Path, sha256: str | None) -> bool:
    return not path.is_symlink() and path.is_file() and file_sha256(path) == sha256
