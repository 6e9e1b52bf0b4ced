"""The one form of tar that packed bundles have: POSIX ustar, plain files only, nothing in it but name, size and bytes.

Modes, owners and times are the same for every file, so that equal bundles are equal archives. A header is read by
making the one that its name and size should have: what differs from that in any bit is refused, and no two readers can
take an archive for two things. Any tar reads it (GNU tar, bsdtar, BusyBox, Python).
"""

from __future__ import annotations

from dataclasses import dataclass

from mtu_compile.core.errors import BundleError

BLOCK = 512
#: Two blocks of zeros, and the file ends.
END = bytes(2 * BLOCK)

#: ustar: bytes of a name, and of what can stand before it (``prefix/name``).
_NAME, _PREFIX = 100, 155
#: Largest size in eleven octal digits; larger ones are binary, as GNU tar and all others today have it.
_OCTAL = 8**11 - 1
_BINARY = 1 << 63

_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"S": "a sparse file",
}

#: What files that are no tar begin with.
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "Zstandard",
    b"PK": "zip",
}


@dataclass(frozen=True)
class Member:
    """A file of an archive: its path in the bundle, and its bytes."""

    name: str
    size: int

    @property
    def padding(self) -> int:
        """Zero bytes after its content, up to the next block."""
        return -self.size % BLOCK


def header(member: Member) -> bytes:
    """The block before a file's content. ``BundleError`` for a name or size that ustar has no place for."""
    prefix, name = _split(member.name)
    if not 0 <= member.size < _BINARY:
        raise BundleError(f"{member.name} has an impossible size, {member.size} bytes")
    size = b"%011o\0" % member.size if member.size <= _OCTAL else b"\x80" + member.size.to_bytes(11, "big")
    block = b"".join(
        (
            name.ljust(_NAME, b"\0"),
            b"0000644\0" + b"0000000\0" * 2,  # mode, user and group
            size,
            b"00000000000\0",  # time
            b" " * 8,  # the checksum, while it is computed
            b"0",  # a plain file
            bytes(100),
            b"ustar\00000",
            bytes(32 + 32),  # names of user and group
            b"0000000\0" * 2,
            prefix.ljust(_PREFIX, b"\0"),
            bytes(12),
        )
    )
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def read_header(block: bytes) -> Member:
    """The file that a header of 512 bytes announces. ``BundleError`` unless ``header`` would write the same bytes."""
    member = announced(block)
    check_header(member, block)
    return member


def announced(block: bytes) -> Member:
    """What a header seems to announce, for whoever has more to say of the name; ``check_header`` has to follow.

    Raises:
        BundleError: this is no ustar, or not of a plain file.
    """
    name = _text(block[345 : 345 + _PREFIX]), _text(block[:_NAME])
    path = b"/".join(part for part in name if part).decode("utf-8", "surrogateescape")
    shown = path if path.isprintable() else ascii(path)
    if block[257:263] not in (b"ustar\0", b"ustar "):
        packing = next((packing for magic, packing in _MAGIC.items() if block.startswith(magic)), None)
        raise BundleError(
            "it is not a packed bundle" if packing is None else f"it is compressed ({packing}); packed bundles are not",
            hint="mtu-compile pack makes one",
        )
    kind = block[156:157]
    if kind not in (b"0", b"\0"):
        what = _KINDS.get(kind, "an extension of tar's that bundles do not use")
        raise BundleError(f"{shown!r} is {what}; a packed bundle holds only plain files")
    return Member(path, _size(block[124:136], shown))


def check_header(member: Member, block: bytes) -> None:
    """``BundleError`` unless ``block`` is the header of ``member``, bit by bit."""
    try:
        same = header(member) == block
    except UnicodeEncodeError:  # the name is not UTF-8
        same = False
    if not same:
        raise BundleError(f"the header of {member.name!r} is not written as mtu-compile pack writes it")


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]


def _size(field: bytes, name: str) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field[:11]
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise BundleError(f"the header of {name!r} has no readable size")
    return int(digits, 8)


def _split(path: str) -> tuple[bytes, bytes]:
    """(prefix, name) of a path; the prefix as short as it can be, and empty if all fits into the name."""
    whole = path.encode()
    if len(whole) <= _NAME:
        return b"", whole
    at = whole.find(b"/", max(len(whole) - _NAME - 1, 1))
    if not 1 <= at <= _PREFIX or at == len(whole) - 1:
        raise BundleError(f"the path {path!r} is too long to be packed", hint=f"{_NAME} bytes are always possible")
    return whole[:at], whole[at + 1 :]
