"""One file of weights that several graphs point into: each distinct content is in it once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

#: Weights begin at multiples of this, a line of a CPU's cache, so that a mapped file can be computed with as it is.
ALIGNMENT = 64

_PIECE = 1 << 20


@dataclass(frozen=True)
class Weight:
    """Bytes of a constant, from ``offset`` on: of a file, or of a graph that is in memory."""

    source: Path | bytes
    offset: int
    size: int

    def pieces(self) -> Iterator[bytes]:
        """The bytes, a megabyte at a time. ``EOFError`` if the file ends before they do."""
        if isinstance(self.source, bytes):
            yield self.source[self.offset : self.offset + self.size]
            return
        left = self.size
        with self.source.open("rb") as file:
            file.seek(self.offset)
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise EOFError(f"{self.source} ends before byte {self.offset + self.size}")
                left -= len(piece)
                yield piece

    def digest(self) -> str:
        """SHA-256 of the bytes."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


@dataclass
class WeightFile:
    """A file that only grows, and what is where in it.

    Attributes:
        file: open for writing, at its end.
        end: bytes it has.
        places: offset by SHA-256 of what begins there.
    """

    file: BinaryIO
    end: int = 0
    places: dict[str, int] = field(default_factory=dict)

    def put(self, weight: Weight, digest: str) -> int:
        """Where ``weight``, whose SHA-256 is ``digest``, lies in the file; it is appended if it does not yet."""
        if digest not in self.places:
            start = -(-self.end // ALIGNMENT) * ALIGNMENT
            self.file.write(bytes(start - self.end))
            for piece in weight.pieces():
                self.file.write(piece)
            self.end = start + weight.size
            self.places[digest] = start
        return self.places[digest]


def common_bytes(graphs: Iterable[Mapping[str, int]]) -> int:
    """Bytes that graphs have in common, and need not have each: of every content all that is one too many.

    Args:
        graphs: of each, size by SHA-256 of its constants.
    """
    known: set[str] = set()
    common = 0
    for sizes in graphs:
        common += sum(size for digest, size in sizes.items() if digest in known)
        known.update(sizes)
    return common
