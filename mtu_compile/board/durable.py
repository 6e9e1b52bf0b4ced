"""Writes that a loss of power does not undo: bytes reach the disk before the name that says they are there.

A rename is atomic, but not ordered with what was written before it: after a crash a file can have its new name and none
of its bytes. So everything a board decides by goes through here. Python's own library alone.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
from pathlib import Path


def write(path: Path, content: bytes, mode: int = 0o644, *, via: Path | None = None) -> None:
    """Write a file all at once: after a crash ``path`` has its old content or ``content``, whole.

    Args:
        via: folder on the same file system for the unfinished file, where it may not be seen beside ``path``.
    """
    temporary = _temporary(path, via)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def link(source: Path, path: Path, *, via: Path | None = None) -> None:
    """Make ``path`` another name of ``source``, in the place of what had it; ``via`` as in ``write``."""
    temporary = _temporary(path, via)
    try:
        temporary.hardlink_to(source)
        temporary.replace(path)  # does nothing where both are the same file, and leaves the temporary name
    finally:
        temporary.unlink(missing_ok=True)


def point(path: Path, target: str) -> None:
    """Make ``path`` a symbolic link to ``target``, in the place of another one, by one rename."""
    temporary = _temporary(path, None)
    try:
        temporary.symlink_to(target)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def rename(source: Path, path: Path) -> None:
    """Give a folder or file its final name; its content has to be on the disk already."""
    source.rename(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Have a file's bytes on the disk."""
    _sync(path, os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)


def sync_tree(path: Path) -> None:
    """Have all that was written on the file system of ``path`` on the disk: one call for thousands of files."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "syncfs") or libc.syncfs(descriptor) != 0:
            os.sync()
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder for good; nothing happens if it is not there.

    A folder loses its name first: what a crash leaves half removed has none that anything goes by.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f".{path.name.lstrip('.')}.{secrets.token_hex(4)}.removed")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _temporary(path: Path, via: Path | None) -> Path:
    return (via or path.parent) / f".{path.name}.{secrets.token_hex(4)}.new"


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
