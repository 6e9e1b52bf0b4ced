"""Files of folders that somebody else may have written."""

from __future__ import annotations

import stat
from pathlib import Path


def is_inside(folder: Path, path: Path) -> bool:
    """Whether ``path`` leads to a file of ``folder``, links followed."""
    real = path.resolve()
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":
        # A snapshot in the Hugging Face cache is made of links into its own store of blobs.
        roots.append(roots[0].parents[1] / "blobs")
    return any(real.is_relative_to(root) for root in roots)


def what_else(path: Path) -> str | None:
    """What ``path`` is if not a plain file, in words; ``None`` if it is one. ``OSError`` if it is not there.

    To be asked before a file is opened: a pipe would hang its reader, a link leads out of the folder.
    """
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode):
        return None
    return "a symbolic link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "not a plain file"
