"""How much a cache may hold."""

from __future__ import annotations

import shutil
from pathlib import Path

#: Bytes; several builds of Stable Diffusion 1.5's size, whose float graph alone has 3.4 GB for each task.
MOST = 100 * 10**9
#: Of the disk it lies on.
SHARE = 0.25


def limit_of(folder: Path) -> int:
    """Bytes that a build leaves in the cache ``folder``: a quarter of its disk, and no more than 100 GB."""
    while not folder.is_dir():
        folder = folder.parent
    return int(min(MOST, SHARE * shutil.disk_usage(folder).total))
