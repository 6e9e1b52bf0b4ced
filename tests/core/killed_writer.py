"""A process that writes a folder and stops at the moment it is told to, for a test to kill it there.

Usage: killed_writer.py DESTINATION MOMENT. It says "here" at the moment, and goes on when it reads a line.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtu_compile.core.atomic import atomic_file, staging

MARKER = "marker"


def stop(*arguments: Any, **options: Any) -> None:
    print("here", flush=True)
    sys.stdin.readline()


def before(owner: Any, name: str, ends: str) -> None:
    """Stop before ``owner.name`` is called with a path that ends in ``ends``."""
    original: Callable[..., Any] = getattr(owner, name)

    def stopping(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path).endswith(ends):
            stop()
        return original(path, *arguments, **options)

    setattr(owner, name, stopping)


def write(destination: Path, moment: str) -> None:
    if moment == "in a file":
        with atomic_file(destination / MARKER) as temporary:
            temporary.write_text("half")
            stop()
        return
    hooks = {
        "before the folder": (Path, "mkdir", ".partial"),
        "old one away": (Path, "rename", ".partial"),
        "new one in place": (Path, "rename", ".old"),
        "old one going": (shutil, "rmtree", ".removed"),
    }
    if moment in hooks:
        before(*hooks[moment])
    with staging(destination, replace=True, marker=MARKER) as folder:
        (folder / MARKER).write_text("new")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.work-") as work:
            (Path(work) / "graph").write_text("large")
            if moment == "at work":
                stop()


if __name__ == "__main__":
    write(Path(sys.argv[1]), sys.argv[2])
