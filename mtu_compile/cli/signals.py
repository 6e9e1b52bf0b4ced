"""Signals that ask a command to end: it cleans up as after Ctrl-C, and its exit code says which it was."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType

#: Signals that end a process without a word unless they are caught, and what a command says of them.
_WORDS = {"SIGTERM": "terminated", "SIGHUP": "hung up"}

#: Seconds. A shutdown sends both, one after the other: the second must not break off the cleaning up after the first. A
#: later one is heard again, as the first may have been raised where Python throws exceptions away (in a ``__del__``).
_TOGETHER = 10.0


class Stopped(SystemExit):
    """Raised in the main thread by a signal; like Ctrl-C's, no ``except Exception`` on its way stops it.

    Attributes:
        code: 128 and the signal's number, as shells have it: 143 for SIGTERM, 129 for SIGHUP.
        word: what happened ("terminated").
    """

    code: int

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.word = _WORDS[signal.Signals(signum).name]


def catch_signals() -> None:
    """Let SIGTERM and SIGHUP raise ``Stopped``, except where the caller ignores them (``nohup``)."""
    before = -math.inf

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal before
        together, before = time.monotonic() - before < _TOGETHER, time.monotonic()
        if not together:
            raise Stopped(signum)

    for name in _WORDS:
        signum = getattr(signal, name, None)  # Windows has no SIGHUP
        if signum is not None and signal.getsignal(signum) == signal.SIG_DFL:
            signal.signal(signum, stop)
