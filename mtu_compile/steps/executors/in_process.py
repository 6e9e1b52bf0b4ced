"""Steps in this process, one after the other: what small models are built with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mtu_compile.core.progress import Progress
from mtu_compile.steps.perform import Job, perform_in
from mtu_compile.steps.store import Store


class InThisProcess:
    """Runs jobs here and now."""

    at_once = 1

    def prepare(self, store: Store, inputs: Mapping[Path, str], progress: Progress) -> None:
        """Whatever a step needs is here."""

    def run(self, store: Store, jobs: Sequence[Job], progress: Progress) -> None:
        for job in jobs:
            perform_in(store, job, progress)

    def close(self) -> None:
        """Nothing was begun."""
