"""Packed bundles."""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Sequence
from typing import BinaryIO

from mtu_compile.bundle import archive, tar
from mtu_compile.bundle.archive import Limits
from mtu_compile.core.errors import BundleError
from tests.fuzz import json_mutation
from tests.fuzz.harness import Harness, Wrong, new_folder
from tests.fuzz.manifests import Manifests
from tests.fuzz.signed_bundle import signed_bundle

_LIMITS = Limits(files=100, bytes=1 << 20)
_NAMES = (
    b"../x",
    b"/x",
    b"./x",
    b"unet",
    b"built/x",
    b"manifest.json",
    b"signature.json",
    b"MANIFEST.json",
    b"",
    b"\xff",
)


class _Kept(io.BytesIO):
    """A file that keeps its content when it is closed; it has no place on the disk to be flushed to."""

    content = b""

    def close(self) -> None:
        if not self.closed:
            self.content = self.getvalue()
        super().close()


class Archives(Harness):
    """``bundle.archive``: with a key only the signed archive is taken; without, what its manifest lists and no more."""

    name = "archive"

    def __init__(self) -> None:
        self.folder = new_folder()

    def seeds(self) -> Sequence[bytes]:
        made = signed_bundle()
        return made.archive, made.unsigned_archive

    def mutate(self, data: bytes, rng: random.Random) -> bytes | None:
        if rng.random() < 0.2:
            return None
        members = _members(data)
        if not members:
            return None
        for _ in range(rng.choice((1, 1, 2, 4))):
            _change(members, rng)
        end = rng.choice((tar.END, tar.END, tar.END, b"", bytes(512), tar.END + bytes(512), tar.END + b"x"))
        return b"".join(block + content + bytes(-len(content) % tar.BLOCK) for block, content in members) + end

    def read(self, data: bytes) -> None:
        made = signed_bundle()
        placed: dict[str, _Kept] = {}

        def place(name: str) -> BinaryIO:
            if name in placed:
                raise Wrong(f"{name!r} is written twice")
            placed[name] = _Kept()
            return placed[name]

        with_flush, archive._closing = archive._closing, _closing  # type: ignore[assignment]
        try:
            listed = archive.read(io.BytesIO(data), len(data), limits=_LIMITS, place=place)
        finally:
            archive._closing = with_flush  # type: ignore[assignment]
        unsigned = placed.keys() - {"manifest.json", "signature.json"}
        if unsigned != listed.manifest.files.keys() or len(data) > _LIMITS.bytes + 512 * 300:
            raise Wrong("not what its manifest lists")
        self._unpack(data, {name: kept.content for name, kept in placed.items()})
        try:
            archive.read(io.BytesIO(data), len(data), limits=_LIMITS, trusted=made.trusted)
        except BundleError:
            return
        if data != made.archive:
            raise Wrong("an archive that nobody signed is taken")

    def _unpack(self, data: bytes, expected: dict[str, bytes]) -> None:
        """That it is on the disk what it was in memory, in its folder and nowhere else, and packs to the same bytes."""
        inner = self.folder / "inner"
        shutil.rmtree(inner, ignore_errors=True)
        inner.mkdir()
        (inner / "a.tar").write_bytes(data)
        archive.unpack(inner / "a.tar", inner / "out", limits=_LIMITS)
        found = {
            path.relative_to(inner / "out").as_posix(): path.read_bytes()
            for path in (inner / "out").rglob("*")
            if path.is_symlink() or not path.is_dir()
        }
        if found != expected or sorted(path.name for path in inner.iterdir()) != ["a.tar", "out"]:
            raise Wrong("it unpacks to something else")
        if archive.pack(inner / "out", inner / "b.tar").read_bytes() != data:
            raise Wrong("there are two archives of one bundle")
        if sorted(path.name for path in self.folder.iterdir()) != ["inner"]:
            raise Wrong("it wrote outside its folder")


class _closing:
    """``archive._closing`` for files in memory."""

    def __init__(self, out: BinaryIO) -> None:
        self.out = out

    def __enter__(self) -> BinaryIO:
        return self.out

    def __exit__(self, *error: object) -> None:
        self.out.close()


def _members(data: bytes) -> list[tuple[bytes, bytes]]:
    """(header, content) of what looks like files."""
    found, at = [], 0
    while at + tar.BLOCK <= len(data) and len(found) < 40:
        block = data[at : at + tar.BLOCK]
        if not block.strip(b"\0"):
            break
        digits = block[124:135]
        size = int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else 0
        size = min(size, len(data) - at - tar.BLOCK)
        found.append((block, data[at + tar.BLOCK : at + tar.BLOCK + size]))
        at += tar.BLOCK + size + -size % tar.BLOCK
    return found


def _change(members: list[tuple[bytes, bytes]], rng: random.Random) -> None:
    at, other = rng.randrange(len(members)), rng.randrange(len(members))
    block, content = members[at]
    way = rng.randrange(9)
    if way == 0 and len(members) > 1:
        del members[at]
    elif way == 1:
        members.insert(other, members[at])
    elif way == 2:
        members[at], members[other] = members[other], members[at]
    elif way == 3:  # another kind of file
        members[at] = (
            _checked(block[:156] + rng.choice((b"1", b"2", b"5", b"x", b"g", b"L", b"S", b"\0")) + block[157:]),
            content,
        )
    elif way == 4:
        members[at] = _checked(rng.choice(_NAMES).ljust(100, b"\0") + block[100:]), content
    elif way == 5:
        size = rng.choice(
            (b"77777777777\0", b"\x80" + bytes(10) + b"\x05", b"\x80" + b"\xff" * 11, b"0000000001 ", b"00000000000\0")
        )
        members[at] = _checked(block[:124] + size.ljust(12, b"\0") + block[136:]), content
    elif way == 6:  # a manifest or signature that agrees with itself
        changed = Manifests().mutate(content, rng) or json_mutation.mutate(content, rng)
        if changed is not None:
            name = block[:100].split(b"\0")[0].decode(errors="replace")
            members[at] = tar.header(tar.Member(name[:90], len(changed))), changed
    elif way == 7:
        field = rng.randrange(512)
        members[at] = _checked(block[:field] + bytes([rng.randrange(256)]) + block[field + 1 :]), content
    else:
        field = rng.randrange(len(content)) if content else 0
        members[at] = block, content[:field] + bytes([rng.randrange(256)]) + content[field + 1 :]


def _checked(block: bytes) -> bytes:
    """A header with its checksum set right."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]
