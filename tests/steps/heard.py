"""What a build's terminal would show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mtu_compile.core.progress import Advance, Progress


class Heard(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[object] = []
        self.warnings: list[str] = []
        self.told: list[str] = []

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        self.said.append((title, total))
        yield self.said.append
        self.said.append("end")

    def note(self, message: str) -> None:
        self.said.append(message)
        self.warnings.append(message)

    def tell(self, message: str) -> None:
        self.told.append(message)
