"""Independent parts of a build at the same time: each a thread that waits for its steps, while others run elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from mtu_compile.core.progress import Advance, Progress, ignore

R = TypeVar("R")
T = TypeVar("T")


def all_at_once(work: Callable[[T], R], over: Sequence[T], give_up: Callable[[], None]) -> list[R]:
    """``work`` of each of ``over``, at the same time.

    Args:
        give_up: called where this thread is told to stop, so that the others come to their end.

    Raises:
        Exception: the first of what ``work`` raised, by the order of ``over``, after the others came to their end.
    """
    if len(over) < 2:
        return [work(one) for one in over]
    with ThreadPoolExecutor(len(over), thread_name_prefix="build") as pool:
        begun = [pool.submit(work, one) for one in over]
        try:
            wait(begun)
        except BaseException:
            give_up()
            raise
    return [one.result() for one in begun]


class Locks:
    """A lock for each name."""

    def __init__(self) -> None:
        self._locks: dict[str, threading.RLock] = {}
        self._own = threading.Lock()

    @contextmanager
    def held(self, *names: str) -> Iterator[None]:
        """Hold those of ``names``; all take them in the same order, so that nobody waits for who waits for him."""
        with ExitStack() as stack:
            for name in sorted(names):
                with self._own:
                    lock = self._locks.setdefault(name, threading.RLock())
                stack.enter_context(lock)
            yield


class SharedProgress(Progress):
    """``progress`` of several threads: one of them draws its stage, and of others it is told that theirs begin."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._draws = threading.Lock()
        self._says = threading.Lock()

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        if self._draws.acquire(blocking=False):
            try:
                with self.progress.stage(title, total) as advance:
                    yield advance
            finally:
                self._draws.release()
        else:
            self.tell(f"{title} …")
            yield ignore

    def note(self, message: str) -> None:
        with self._says:
            self.progress.note(message)

    def tell(self, message: str) -> None:
        with self._says:
            self.progress.tell(message)
