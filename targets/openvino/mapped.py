"""Memory of files that OpenVINO has mapped, and read for the last time."""

from __future__ import annotations

import ctypes
from pathlib import Path

_MADV_DONTNEED = 4


def give_back(file: Path) -> int:
    """Take the pages of a mapped file out of this process's memory; what is read again comes from the file again.

    OpenVINO keeps a model's ``.bin`` mapped for as long as the compiled model lives. A CPU's kernels have copies of
    their own of almost all of it, so the weights are in memory twice: as the file has them, and as the kernels want
    them.

    Returns:
        Bytes of the mappings that were given back; 0 where this system tells of none (Linux alone does).
    """
    maps, found = Path("/proc/self/maps"), 0
    if not maps.exists():
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    name = str(file.resolve())
    for line in maps.read_text().splitlines():
        span, access, *_, path = [*line.split(maxsplit=5), ""][:6]
        # What may be written is not the file's any more, and would be lost.
        if path == name and access.startswith("r--"):
            start, end = (int(one, 16) for one in span.split("-"))
            if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED) == 0:
                found += end - start
    return found
