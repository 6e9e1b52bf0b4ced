"""A process for steps beside the one that is told to run them: what a worker of a cluster does its work in.

A worker's own process talks to the cluster, and must answer it while a step computes. It may also have been started
with other settings of threads and instructions than the build has, which libraries read when they are imported.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout

R = TypeVar("R")

#: Seconds between two looks at whether anybody still wants what is made here.
LOOK = 0.5


class Died(Exception):
    """The process ended before it answered; the argument is its exit code."""


class Child:
    """A process that calls functions of modules for this one.

    Args:
        lease: a file that is locked for as long as the process is wanted.
        environment: what to set in its environment, or not to have there.
    """

    def __init__(self, lease: Path, environment: Mapping[str, str | None]) -> None:
        set_here = {**os.environ, **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid()), str(lease)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={name: value for name, value in set_here.items() if value is not None},
        )

    def call(self, function: Callable[..., R], *given: Any) -> R:
        """``function(*given)`` there.

        Raises:
            Died: the process is gone.
            Exception: what the function raises.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump((function, given), self._process.stdin)
            self._process.stdin.flush()
            well, answer = pickle.load(self._process.stdout)  # of a process that is ours
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise Died(self._process.wait()) from error
        if not well:
            raise answer
        result: R = answer
        return result

    @property
    def alive(self) -> bool:
        """Whether it can be called."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Answer calls until there are no more, or nobody wants them."""
    parent, lease = int(sys.argv[1]), Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    end_when(lambda: os.getppid() != parent or not held(lease))
    while True:
        try:
            function, given = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = True, function(*given)
        except Exception as error:
            answer = False, _portable(error)
        _send(answer, answers)


def end_when(unwanted: Callable[[], bool]) -> None:
    """End this process when it is not wanted any more, even if nobody can say so."""

    def watch() -> None:
        while not unwanted():
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def held(lock: Path) -> bool:
    """Whether somebody, here or on another machine, holds a lock."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def _send(answer: tuple[bool, Any], answers: IO[bytes]) -> None:
    answers.write(pickle.dumps(answer))
    answers.flush()


def _portable(error: Exception) -> Exception:
    """The error, or what it says where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


if __name__ == "__main__":
    main()
