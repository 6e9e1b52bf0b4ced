"""How long work reports what it is doing, without knowing who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Called with the number of units done since the last call.
Advance = Callable[[int], None]


def ignore(units: int) -> None:
    """An ``Advance`` that nobody watches."""


class Progress:
    """Watches nothing; the command line derives one that draws."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """One stage of the work; ``total`` units, or ``None`` where they cannot be counted."""
        yield ignore

    def note(self, message: str) -> None:
        """Something that is no error, and not what may have been meant."""

    def tell(self, message: str) -> None:
        """What was decided on the way, and why."""
