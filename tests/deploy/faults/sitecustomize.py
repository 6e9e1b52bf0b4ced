"""Found by a board's Python: kills an agent before the file operation of a given number, and says which there were.

``MTU_FAULT`` is ``NUMBER:FOLDER:LOG``. What is counted are the operations that change files in FOLDER; each is written
to LOG before it is done.
"""

import os
import signal
import sys
from typing import Any

_CHANGES = {"os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


def _changed(event: str, arguments: Any) -> Any:
    """The path that an operation changes; ``None`` for one that changes nothing."""
    if event == "open":
        path, _, flags = arguments
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        return path if writes else None
    if event not in _CHANGES:
        return None
    return arguments[1] if event in ("os.rename", "os.link", "os.symlink") else arguments[0]


def _install(number: int, folder: str, log: str) -> None:
    seen = 0

    def hook(event: str, arguments: Any) -> None:
        nonlocal seen
        path = _changed(event, arguments)
        if path is None or isinstance(path, int) or folder not in os.fsdecode(path) or os.fsdecode(path) == log:
            return
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, f"{event} {os.fsdecode(path)}\n".encode())
        os.close(descriptor)

    sys.addaudithook(hook)


_said = os.environ.get("MTU_FAULT", "")
if _said and any("mtu_compile.board.agent" in word for word in sys.orig_argv):
    _number, _folder, _log = _said.split(":")
    _install(int(_number), _folder, _log)
