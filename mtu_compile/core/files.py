"""Files of folders that somebody else may have written."""

from __future__ import annotations

import stat
from pathlib import Path


def what_else(path: Path) -> str | None:
    """What ``path`` is if not a plain file, in words; ``None`` if it is one. ``OSError`` if it is not there.

    To be asked before a file is opened: a pipe would hang its reader, a link leads out of the folder.
    """
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode):
        return None
    return "a symbolic link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "not a plain file"
