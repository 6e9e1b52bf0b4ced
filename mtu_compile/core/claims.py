"""Who writes beside a place: names for what is not finished, and a lock that dies with the process that holds it.

A process that is killed removes nothing. So each one that writes ``out`` takes a name of its own, ``.out.1f0c83aa``,
begins the names of all it makes with it, and holds a lock on ``.out.1f0c83aa.lock`` meanwhile. The next one to write
``out`` removes what has a lock that nobody holds. The kernel lets go of a lock when its holder dies, however it dies:
unlike a process id in a file, it cannot be mistaken for that of a later process.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing says there who is alive, so nothing is removed
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"
#: End of the name of what was in the place before, as long as it may have to be put back.
OLD = ".old"


@contextmanager
def claim(target: Path) -> Iterator[Path]:
    """A path beside ``target`` that no other process uses; whoever begins a name with it removes what it names.

    What dead processes left beside ``target`` is removed first, see ``sweep``.

    Raises:
        OSError: the folder of ``target`` is not there or cannot be written.
    """
    sweep(target)
    stem, descriptor = _take(target)
    try:
        yield stem
    finally:
        with suppress(OSError):  # while it is still locked, or somebody else might take it for a dead one's
            _lock_of(stem).unlink()
        os.close(descriptor)


def sweep(target: Path) -> None:
    """Remove what processes that are dead began beside ``target``.

    What ``target`` was before is put back if the process died while it was away. What live processes, other programs or
    other users have there is left alone, and so is all where locks are not to be had (Windows, some network drives).
    """
    _sweep(target.parent, re.escape(target.name))


def sweep_folder(folder: Path) -> None:
    """``sweep`` for every place in ``folder``."""
    _sweep(folder, ".+")


def _sweep(folder: Path, name: str) -> None:
    pattern = re.compile(rf"\.({name})\.[0-9a-f]{{8}}{re.escape(_LOCK)}", re.DOTALL)
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return
    for lock in names:
        if match := pattern.fullmatch(lock):
            _bury(folder / match[1], folder / lock.removesuffix(_LOCK), names)


def _bury(target: Path, stem: Path, names: list[str]) -> None:
    """Remove all of ``names`` that begin with ``stem``, if nobody holds its lock."""
    if fcntl is None:
        return
    try:
        descriptor = os.open(_lock_of(stem), os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return  # removed meanwhile, or another user's
    try:
        if os.fstat(descriptor).st_uid != os.geteuid() or not _locked(descriptor, wait=False):
            return
        for path in (stem.with_name(name) for name in names if f"{name}.".startswith(f"{stem.name}.")):
            if path.name == f"{stem.name}{OLD}" and not os.path.lexists(target):
                path.rename(target)
            elif path != _lock_of(stem):
                remove(path)
        _lock_of(stem).unlink(missing_ok=True)
    except OSError:
        return  # not ours to remove; whoever can will
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _take(target: Path) -> tuple[Path, int]:
    """A new name beside ``target``, and the open lock of it."""
    while True:
        stem = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        descriptor = os.open(_lock_of(stem), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        _locked(descriptor, wait=True)
        if os.fstat(descriptor).st_nlink:
            return stem, descriptor
        os.close(descriptor)  # somebody swept it up between the last two calls


def _lock_of(stem: Path) -> Path:
    return stem.with_name(stem.name + _LOCK)


def _locked(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock could be had; a lock ends with its process, and by closing the file."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # somebody has it, or this file system has no locks
        return False
    return True
