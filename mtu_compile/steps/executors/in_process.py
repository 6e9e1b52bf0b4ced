"""Steps in this process, one after the other: what small models are built with."""

from __future__ import annotations

from collections.abc import Sequence

from mtu_compile.core.progress import Progress
from mtu_compile.steps.perform import Job, perform_in
from mtu_compile.steps.store import Store


class InThisProcess:
    """Runs jobs here and now."""

    def run(self, store: Store, jobs: Sequence[Job], progress: Progress) -> None:
        for job in jobs:
            perform_in(store, job, progress)

    def close(self) -> None:
        """Nothing was begun."""
