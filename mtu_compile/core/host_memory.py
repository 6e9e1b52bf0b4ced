"""Memory of the machine this runs on."""

from __future__ import annotations

import os
from pathlib import Path


def host_memory() -> int | None:
    """Memory of this machine in bytes, or of the container this runs in; ``None`` where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # control groups, version 2 and 1
        try:
            total = min(total, int(Path("/sys/fs/cgroup", file).read_text()))
        except (OSError, ValueError):  # "max" where there is no limit
            continue
    return total
