"""What an executor is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mtu_compile.core.progress import Progress
from mtu_compile.steps.perform import Job
from mtu_compile.steps.store import Store


class Executor(Protocol):
    """Runs jobs, each by ``perform``, wherever it likes.

    Attributes:
        at_once: how many it runs at the same time; if several, ``run`` may be called by several threads.
    """

    at_once: int

    def prepare(self, store: Store, inputs: Mapping[Path, str], progress: Progress) -> None:
        """See, before anything is run, whether it can be.

        Args:
            store: open here; jobs' results are to be there.
            inputs: hashes of the files and model folders from outside that jobs read.

        Raises:
            ConfigError: who is to run them cannot.
        """
        ...

    def run(self, store: Store, jobs: Sequence[Job], progress: Progress) -> None:
        """Have all of ``jobs`` in ``store``, which is open here; they do not depend on each other.

        Raises:
            MtuError: the first that a job raised, after the others came to their end.
        """
        ...

    def close(self) -> None:
        """End what it began, at once."""
        ...
