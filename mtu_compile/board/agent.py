"""A board's end of a deployment: reads requests from standard input, writes answers to standard output, JSON by lines.

``python -m mtu_compile.board.agent --root FOLDER`` is started over SSH for as long as a deployment lasts, with our
wheel alone: Python's own library is all it needs. A request is ``{"do": step, …arguments}``; what comes back is any
number of ``{"stage": title}``, and last ``{"ok": result}`` or ``{"error": {"kind", "message", "hint"}}``.
``{"do": "ping"}`` is not answered: it says that the host is still there. An agent that hears nothing for ``--silence``
seconds, or whose input ends, ends itself at once, in the middle of whatever it does; every step is made for that. So a
cut cable does not leave a board locked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtu_compile.board.steps import Steps, tell_of
from mtu_compile.board.store import Store
from mtu_compile.core.version import __version__

#: Of what is said here; another one is not understood.
PROTOCOL = 1

#: Steps that change nothing, and so need no lock.
_WATCHING = frozenset({"status"})
_DEPLOYING = ("offer", "accept", "unpack", "install", "build", "check", "activate")
_STEPS = frozenset({*_WATCHING, *_DEPLOYING, "rollback", "prune", "trust_keys"})
#: Exit code of an agent that was left alone.
_ALONE = 75


class Agent:
    """One deployment's requests, one after the other."""

    def __init__(self, root: Path, silence: float) -> None:
        self._silence = silence
        self._heard = time.monotonic()
        self._requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self._child: subprocess.Popen[str] | None = None
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what a library prints is no answer
        self._store = Store(root)
        self._steps = Steps(self._store, lambda title: self._say({"stage": title}), self._run)

    def serve(self) -> None:
        """Answer until the input ends."""
        threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        self._say({"ok": {"protocol": PROTOCOL, "version": __version__, "pid": os.getpid()}})
        with contextlib.ExitStack() as held:
            locked = False
            while True:
                request = self._requests.get()
                try:
                    step = request.pop("do", None)
                    if step not in _STEPS:
                        raise ValueError(f"a step {step!r} is not known")
                    if step not in _WATCHING and not locked:
                        held.enter_context(self._store.locked(wait=float(request.pop("wait", 0))))
                        self._steps.trust.record()
                        locked = True
                    request.pop("wait", None)
                    self._say({"ok": getattr(self._steps, step)(**request)})
                except Exception as error:
                    self._say({"error": tell_of(error)})

    def _listen(self) -> None:
        for line in sys.stdin:
            self._heard = time.monotonic()
            try:
                request = json.loads(line)
                if not isinstance(request, dict):
                    raise ValueError("not an object")
            except ValueError:
                break  # not our host
            if request.get("do") != "ping":
                self._requests.put(request)
        self._end()

    def _watch(self) -> None:
        while time.monotonic() - self._heard < self._silence:
            time.sleep(min(1.0, self._silence / 4))
        self._end()

    def _run(self, child: subprocess.Popen[str] | None) -> None:
        self._child = child

    def _end(self) -> None:
        """Without cleaning up: that is the next one's, as after a loss of power."""
        if (child := self._child) is not None:
            child.kill()
        os._exit(_ALONE)

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()
        except OSError:
            self._end()


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="mtu_compile.board.agent")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--silence", type=float, default=60.0)
    given = parser.parse_args(arguments)
    try:
        agent = Agent(given.root.expanduser(), given.silence)
    except OSError as error:
        print(json.dumps({"error": tell_of(error)}))
        return 1
    agent.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
