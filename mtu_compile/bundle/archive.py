"""A bundle as a single file, and back: ``mtu-compile pack`` and ``unpack``.

The archive is a tar without compression (``bundle.tar``): ``manifest.json``, ``signature.json`` if the bundle is
signed, then every file of the manifest by name. So the manifest is known, and its signature checked, before any other
byte is read; each file has to be the one that is expected next, and is hashed on its way to the disk. One bundle has
exactly one archive, and what unpacks is exactly the bundle.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mtu_compile.bundle import files, signature, tar
from mtu_compile.bundle.manifest import MANIFEST, MOST_MANIFEST_BYTES, SIGNATURE, Manifest, check_relative
from mtu_compile.bundle.plain import GET_AGAIN, opened
from mtu_compile.bundle.signature import Signed
from mtu_compile.core import atomic
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import BundleError, ConfigError, MtuError

if TYPE_CHECKING:
    from mtu_compile.bundle.keys import PublicKey

_PIECE = 1 << 20

#: Where an archive's file goes: opens it for writing, by its name. Without one, files are only checked.
Place = Callable[[str], BinaryIO]


@dataclass(frozen=True)
class Limits:
    """What an archive may ask of the machine it is unpacked on.

    Attributes:
        files: how many there are; each takes an inode and a block however small it is.
        bytes: of all files together; an archive is never smaller than what it unpacks to.
    """

    files: int = 10_000
    bytes: int = 256 << 30


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Listed:
    """What was found in an archive, every hash of which held.

    Attributes:
        manifest: the bundle's.
        signed: by whom; ``None`` if no trusted key was demanded.
        bytes: of all files.
    """

    manifest: Manifest
    signed: Signed | None
    bytes: int


def pack(bundle: Path, file: Path, *, replace: bool = False) -> Path:
    """Write the bundle as one file: the same bytes wherever and whenever it is packed.

    What this machine built from it (``built/``) is not packed: a board builds its own.

    Raises:
        BundleError: the bundle is not as it was built, or a name is too long.
        ConfigError: ``file`` exists and is not to be replaced, or lies in the bundle.
        MtuError: the disk is full.
    """
    root = bundle.resolve()
    if file.resolve().is_relative_to(root):
        raise ConfigError(f"{str(file)!r} lies in the bundle itself", hint="name a file elsewhere")
    if file.is_dir() or (os.path.lexists(file) and not replace):
        raise ConfigError(f"{str(file)!r} already exists", hint="choose another place, or pass --force to replace it")
    if not file.absolute().parent.is_dir():
        raise ConfigError(f"{str(file.parent)!r} is not a folder", hint="make it first: mkdir -p")
    manifest = files.read(root)
    with atomic.atomic_file(file) as partial, _no_space(file), partial.open("wb") as out:
        for name in _order(manifest, (root / SIGNATURE).exists()):
            _append(out, root, name, manifest.files.get(name))
        out.write(tar.END)
        out.flush()
        os.fsync(out.fileno())
    return file


def unpack(
    file: Path,
    folder: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    trusted: Sequence[PublicKey] | None = None,
    replace: bool = False,
) -> Listed:
    """Write the bundle in ``file`` to ``folder``, which appears whole or not at all.

    Args:
        file: the archive.
        folder: must not exist, unless ``replace``.
        limits: what it may take here.
        trusted: demand a signature by one of these keys, before anything but manifest and signature is read.
        replace: an existing bundle there is replaced.

    Raises:
        BundleError: it is no packed bundle, was changed, holds what no bundle does, exceeds the limits, or is not
            signed by anybody trusted.
        ConfigError: ``folder`` exists.
        MtuError: the disk is full.
    """
    with _source(file) as (source, size):
        atomic.check_free(folder, replace=replace, marker=MANIFEST)
        _check_space(folder, size)
        with atomic.staging(folder, replace=replace, marker=MANIFEST) as staged:
            listed = read(source, size, limits=limits, trusted=trusted, place=lambda name: _create(staged, name))
            _flush_folders(staged)
    return listed


def check(file: Path, *, limits: Limits = DEFAULT_LIMITS, trusted: Sequence[PublicKey] | None = None) -> Listed:
    """All of ``unpack`` but the writing; raises likewise."""
    with _source(file) as (source, size):
        return read(source, size, limits=limits, trusted=trusted)


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a file, as packed bundles are, and not a folder."""
    return path.is_file()


def read(
    source: BinaryIO,
    size: int,
    *,
    limits: Limits = DEFAULT_LIMITS,
    trusted: Sequence[PublicKey] | None = None,
    place: Place | None = None,
) -> Listed:
    """Read an archive of ``size`` bytes to its end; raises as ``unpack``."""
    reader = _Reader(source, size, limits)
    content = reader.whole(MANIFEST, MOST_MANIFEST_BYTES)
    following = reader.next()
    signed_by: bytes | None = None
    if following is not None and following.name == SIGNATURE:
        signed_by, following = reader.content(following, signature.MOST_BYTES), reader.next()
    signed = None if trusted is None else signature.verify_bytes(content, signed_by, trusted)
    if signed_by is not None:
        signature.parse(content, signed_by)
    manifest = files.parse(content)
    if len(manifest.files) > limits.files:
        raise BundleError(f"the archive has {len(manifest.files)} files, and {limits.files} are allowed")
    for name, data in ((MANIFEST, content), (SIGNATURE, signed_by)):
        if place is not None and data is not None:
            with _closing(place(name)) as out:
                out.write(data)
    known = {MANIFEST, SIGNATURE}
    for name in sorted(manifest.files):
        if following is None or following.name != name:
            raise _unexpected(following, name, known)
        digest = hashlib.sha256()
        with nullcontext(None) if place is None else _closing(place(name)) as out:
            for piece in reader.pieces(following):
                digest.update(piece)
                if out is not None:
                    out.write(piece)
        if digest.hexdigest() != manifest.files[name]:
            raise BundleError(f"{name} is not the file the bundle was built with", hint=GET_AGAIN)
        known.add(name)
        following = reader.next()
    if following is not None:
        raise _unexpected(following, None, known)
    return Listed(manifest, signed, reader.unpacked)


class _Reader:
    """An archive from its beginning to its end, which its limits bound.

    Attributes:
        unpacked: bytes of files so far.
    """

    def __init__(self, source: BinaryIO, size: int, limits: Limits) -> None:
        self._source, self._left, self._limits = source, size, limits
        self.unpacked = 0

    def next(self) -> tar.Member | None:
        """The next file; ``None`` at the end, after which nothing comes."""
        block = self._exactly(tar.BLOCK, "a header")
        if not block.strip(b"\0"):
            if self._exactly(tar.BLOCK, "its end").strip(b"\0") or self._left:
                raise BundleError("the archive goes on after its end")
            return None
        member = tar.announced(block)
        try:
            check_relative(member.name, "the archive")
        except BundleError as error:
            raise BundleError(error.message.removeprefix(f"{MANIFEST}: "), hint=error.hint) from error
        tar.check_header(member, block)
        if member.size + member.padding > self._left:
            raise BundleError(
                f"the archive is truncated: {member.name!r} has {member.size} bytes, and {self._left} come",
                hint="copy it again",
            )
        self.unpacked += member.size
        if self.unpacked > self._limits.bytes:
            raise BundleError(f"the archive has more than the {readable(self._limits.bytes)} that are allowed")
        return member

    def whole(self, name: str, most: int) -> bytes:
        """The content of the next file, which has to be ``name``."""
        member = self.next()
        if member is None or member.name != name:
            raise _unexpected(member, name, set())
        return self.content(member, most)

    def content(self, member: tar.Member, most: int) -> bytes:
        """The content of a small file. ``BundleError`` if it has more than ``most`` bytes."""
        if member.size > most:
            raise BundleError(f"{member.name} has {member.size} bytes, which no such file has")
        return b"".join(self.pieces(member))

    def pieces(self, member: tar.Member) -> Iterator[bytes]:
        """A file's content, a megabyte at a time."""
        for start in range(0, member.size, _PIECE):
            yield self._exactly(min(_PIECE, member.size - start), member.name)
        if self._exactly(member.padding, member.name).strip(b"\0"):
            raise BundleError(f"there are bytes behind {member.name}, which belong to nothing")

    def _exactly(self, count: int, what: str) -> bytes:
        piece = self._source.read(count) if count <= self._left else b""
        if len(piece) != count:
            raise BundleError(f"the archive is truncated: it ends in {what}", hint="copy it again")
        self._left -= count
        return piece


def _unexpected(found: tar.Member | None, wanted: str | None, known: set[str]) -> BundleError:
    """Why a file is not the one that has to come."""
    if found is None:
        return BundleError(f"{wanted} is missing from the archive", hint=GET_AGAIN)
    if found.name in known:
        return BundleError(f"{found.name!r} is in the archive twice")
    if wanted == MANIFEST:
        return BundleError(f"the archive begins with {found.name!r} and not with {MANIFEST}", hint="it is no bundle")
    after = "after its last file" if wanted is None else f"where {wanted!r} has to be"
    return BundleError(f"{found.name!r} is in the archive {after}; only what the manifest lists is unpacked")


def _order(manifest: Manifest, is_signed: bool) -> tuple[str, ...]:
    return (MANIFEST, *((SIGNATURE,) if is_signed else ()), *sorted(manifest.files))


def _append(out: BinaryIO, root: Path, name: str, recorded: str | None) -> None:
    """One file with its header; hashed as it is written, as it may have been changed since it was checked."""
    digest = hashlib.sha256()
    with opened(files.resolve(root, name), name) as source:
        member = tar.Member(name, os.fstat(source.fileno()).st_size)
        out.write(tar.header(member))
        left = member.size
        while left and (piece := source.read(min(left, _PIECE))):
            digest.update(piece)
            out.write(piece)
            left -= len(piece)
        if left or source.read(1) or recorded not in (None, digest.hexdigest()):
            raise BundleError(f"{name} was changed while it was packed", hint="pack again when nobody writes there")
    out.write(bytes(member.padding))


def _create(folder: Path, name: str) -> BinaryIO:
    """A new file of the bundle that is being unpacked; readable for all, and writable for its owner."""
    path = folder / name
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o644)
    return open(descriptor, "wb")  # noqa: PTH123 - a descriptor, which the caller closes


@contextmanager
def _closing(out: BinaryIO) -> Iterator[BinaryIO]:
    """Close a file once it is on the disk: boards lose power, and the rename must not come before the bytes."""
    with out:
        yield out
        out.flush()
        os.fsync(out.fileno())


def _flush_folders(root: Path) -> None:
    if os.name != "posix":
        return
    for folder, _, _ in os.walk(root, topdown=False):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _source(file: Path) -> Iterator[tuple[BinaryIO, int]]:
    """The archive, open, and its size."""
    if not file.exists():
        raise BundleError(f"there is no packed bundle at {str(file)!r}", hint="mtu-compile pack BUNDLE FILE makes one")
    with opened(file.resolve(), str(file)) as source:
        yield source, os.fstat(source.fileno()).st_size


def _check_space(folder: Path, needed: int) -> None:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise MtuError(
            f"the bundle takes {readable(needed)}, and {readable(free)} of the disk are free",
            hint="free some space, or choose another place",
        )


@contextmanager
def _no_space(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MtuError(
                f"no space left on the disk while writing {str(file)!r}",
                hint="free some space, or choose another place; nothing was left behind",
            ) from error
        raise
