"""Steps in processes of their own, so that the most memory a build needs is that of its largest step.

Loky (joblib's) starts the processes, carries what steps are given and what they raise, and notices one that dies. Here
is what it leaves open: a process that has grown is ended, so that its memory comes back; all end with the build,
however that ends; and what steps say of their progress reaches the build's terminal.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from mtu_compile.core.errors import MtuError
from mtu_compile.core.progress import Progress
from mtu_compile.steps.events import EventLog, Told, Watching
from mtu_compile.steps.executors.memory import KEPT, resident
from mtu_compile.steps.perform import Job, perform, step_of
from mtu_compile.steps.store import Store

#: Seconds between two looks at whether the build is still there, and at what steps say.
LOOK = 0.25


class InProcesses:
    """Runs jobs in processes of this machine, one after the other: each takes all its cores, and much of its memory.

    Those that do not (``Step.one_core``) run as many at a time as there are cores.
    """

    at_once = 1

    def __init__(self) -> None:
        self._executor: Any = None
        self._workers = 0

    def prepare(self, store: Store, inputs: Mapping[Path, str], progress: Progress) -> None:
        """Processes of this machine have what this one has."""

    def run(self, store: Store, jobs: Sequence[Job], progress: Progress) -> None:
        from joblib.externals.loky import cpu_count
        from joblib.externals.loky.process_executor import ProcessPoolExecutor, TerminatedWorkerError

        workers = min(len(jobs), cpu_count()) if all(step_of(job).one_core for job in jobs) else 1
        if workers != self._workers:
            self.close()
        if self._executor is None:
            _start_tracker()
            self._executor = ProcessPoolExecutor(workers, initializer=_end_with, initargs=(os.getpid(),))
            self._workers = workers
        try:
            with EventLog(store) as log, Watching(log, progress) as watching:
                made = {self._executor.submit(perform_there, job, log.of(job.name)): job for job in jobs}
                pending: set[Future[int]] = set(made)
                while pending:
                    _, pending = wait(pending, timeout=LOOK)
                    watching.look()
            grown = [future.result() for future in made]
        except TerminatedWorkerError as error:
            self.close()
            raise MtuError(
                f"the process of {_titles(jobs)} was killed, most likely because this machine ran out of memory",
                hint="`mtu-compile plan` says how much a build needs; what was made before is kept for the next try",
            ) from error
        except BaseException:
            self.close()
            raise
        if max(grown) > KEPT:
            self.close()

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, kill_workers=True)
            self._executor = None


def _titles(jobs: Sequence[Job]) -> str:
    return " or ".join(job.title for job in jobs)


def perform_there(job: Job, events: Path) -> int:
    """``perform`` in this process; the bytes of memory it has now."""
    perform(job, Told(events))
    return resident()


def _start_tracker() -> None:
    """Start the process that removes what a killed build leaves of loky's, told not to warn that there was any."""
    from joblib.externals.loky.backend.resource_tracker import ensure_running

    sys.warnoptions.append(quiet := "ignore:resource_tracker")  # which it is started with
    try:
        ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


def _end_with(parent: int) -> None:
    """End this process when the build is gone, even if it was killed and could not say so."""
    from joblib.externals.loky import process_executor

    # Loky ends a process that has grown by 300 MB after any job, and takes it for a fault of the job's. What the next
    # of some jobs wants, imports and the model, would be read anew each time; whether it is ended is decided above.
    process_executor._USE_PSUTIL = False

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
