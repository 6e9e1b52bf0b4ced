"""How much memory a process that runs steps has, and may keep."""

from __future__ import annotations

import os
from pathlib import Path

#: Bytes a process may keep of what its last step used; starting another one costs seconds of imports.
KEPT = 1_500_000_000


def resident() -> int:
    """Bytes of this process in memory, as Linux counts them; more than ``KEPT`` where nobody says."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return KEPT + 1  # so that it is ended
