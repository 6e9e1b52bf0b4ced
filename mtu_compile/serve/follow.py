"""From the version of a bundle that is served to the next one: the process makes way for the next version's own.

On a board the bundle's path leads through a link (``current/bundle``) that a deployment or a rollback points elsewhere.
Each version runs with packages of its own, so opening another bundle in this process would run it with the wrong ones.
Instead the process answers what it has taken, and then becomes the other version's server (``execve``): same process
number, same open socket. Who connects meanwhile waits in the kernel's queue, and is answered by the next one. It needs
no supervisor, no root, and no memory for two.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from mtu_compile.bundle import MANIFEST
from mtu_compile.core.errors import ConfigError, MtuError
from mtu_compile.serve.settings import Settings, options

#: Beside a bundle in a board's store: the command line with the packages of that version.
SCRIPT = "mtu-compile"


class Link:
    """Where a bundle's path led when it was opened.

    Attributes:
        target: the folder, without links.
    """

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self.target = bundle.resolve()

    def moved(self) -> bool:
        """Whether the path leads to another bundle by now; while it leads nowhere, it does not."""
        try:
            now = self._bundle.resolve(strict=True)
        except (OSError, RuntimeError):
            return False
        return now != self.target and (now / MANIFEST).is_file()


def inherited(fd: int) -> socket.socket:
    """The listening socket that this process was started with; ``ConfigError`` if ``fd`` is none."""
    try:
        listening = socket.socket(fileno=fd)
        if not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise OSError("it does not listen")
    except OSError as error:
        raise ConfigError(f"--fd {fd} is no socket to listen at: {error}", hint="leave --fd to supervisors") from error
    listening.set_inheritable(False)
    return listening


def words(settings: Settings, fd: int) -> Iterator[str]:
    """The command that serves what the bundle's path leads to now, at the socket ``fd``."""
    script = settings.bundle.parent / SCRIPT
    if os.access(script, os.X_OK):
        yield from (str(script), "serve")
    else:
        yield from (sys.executable, "-m", "mtu_compile.serve")
    yield str(settings.bundle)
    for one in options():
        value = getattr(settings, one.name)
        if one.name == "fd":
            value = fd
        if one.kind is bool:
            yield from (one.flag,) if value else ()
        else:
            for single in value if one.many else () if value is None else (value,):
                yield from (one.flag, str(single))


def become_next(settings: Settings, listening: socket.socket) -> NoReturn:
    """Go on as the next version's server; ``MtuError`` if its command cannot be run."""
    listening.set_inheritable(True)
    command = list(words(settings, listening.fileno()))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(command[0], command)
    except OSError as error:
        raise MtuError(f"the next version's server cannot be started: {command[0]}: {error.strerror}") from error
