"""Opening a bundle's files: only plain ones, checked on what was opened and not on what lay there a moment before."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mtu_compile.core.errors import BundleError
from mtu_compile.core.files import what_else

GET_AGAIN = "the bundle was changed or damaged after it was built; copy it again, or rebuild it"

#: A link is not followed, and a pipe does not keep its opener waiting. Windows has neither flag, and neither thing.
_CAREFULLY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def regular_file(path: Path, name: str) -> None:
    """``BundleError`` unless ``path``, which messages call ``name``, is a plain file; it is not opened."""
    try:
        kind = what_else(path)
    except (OSError, ValueError) as error:  # ValueError: a name no file can have
        raise BundleError(f"{name} is missing from the bundle", hint=GET_AGAIN) from error
    if kind is not None:
        raise _not_plain(name, kind)


@contextmanager
def opened(path: Path, name: str) -> Iterator[BinaryIO]:
    """The plain file ``path``, for reading. ``BundleError`` as ``regular_file``, also if it is replaced meanwhile."""
    regular_file(path, name)  # first: to open a device may already do something
    try:
        descriptor = os.open(path, os.O_RDONLY | _CAREFULLY)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _not_plain(name, "a symbolic link") from error
        raise BundleError(f"{name} cannot be read: {error.strerror}", hint=GET_AGAIN) from error
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_plain(name, "not a plain file")
        yield file


def read_small(path: Path, name: str, most: int) -> bytes:
    """The content of a plain file of ``most`` bytes or less; ``BundleError`` if it is longer, or as ``opened``."""
    with opened(path, name) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise BundleError(f"{name} is longer than {most} bytes, which no such file is", hint=GET_AGAIN)
    return content


def plain_sha256(path: Path, name: str) -> str:
    """Hexadecimal SHA-256 of a plain file; ``BundleError`` as ``opened``."""
    digest = hashlib.sha256()
    with opened(path, name) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _not_plain(name: str, kind: str) -> BundleError:
    return BundleError(f"{name} is {kind}; a bundle holds only plain files", hint=GET_AGAIN)
