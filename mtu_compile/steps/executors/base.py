"""What an executor is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mtu_compile.core.progress import Progress
from mtu_compile.steps.perform import Job
from mtu_compile.steps.store import Store


class Executor(Protocol):
    """Runs jobs, each by ``perform``, wherever it likes."""

    def run(self, store: Store, jobs: Sequence[Job], progress: Progress) -> None:
        """Have all of ``jobs`` in ``store``, which is open here; they do not depend on each other.

        Raises:
            MtuError: the first that a job raised, after the others came to their end.
        """
        ...

    def close(self) -> None:
        """End what it began, at once."""
        ...
