"""Steps on the workers of a cluster, which all see the cache's folder; what kind of cluster it is, is a subclass's.

Only what a step is given travels through the cluster, as pickles, as it does to any of its tasks. Files are read and
written in the store, by the same locks and renames as by several builds on one machine: a worker that is lost leaves
nothing that could be taken for a result, and its task is run again by another.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtu_compile.core.errors import ConfigError, MtuError
from mtu_compile.core.progress import Progress
from mtu_compile.steps.events import EventLog, Watching
from mtu_compile.steps.executors.there import Done, Expected, Lost, Unfit, look, perform_there
from mtu_compile.steps.perform import Job
from mtu_compile.steps.store import Store

#: Seconds between two looks at what is done, and at whether there are workers.
POLL, COUNT = 0.1, 2.0
#: Seconds: for the cluster to answer; for all workers to say whether they are fit, of which some may be busy; without
#: any worker until a build gives up.
ANSWER, LOOK_AROUND, ALONE = 20.0, 60.0, 120.0
#: How often a step is tried whose process is killed on the worker it runs on.
TRIES = 3


class Left(Exception):
    """A task is not run any more, because the cluster was left or its scheduler is gone."""


class Cluster(ABC):
    """Runs jobs on the cluster at ``address``, each worker one at a time.

    Args:
        address: ``host:port``.
    """

    #: Of the address.
    scheme: str

    def __init__(self, address: str) -> None:
        self.address = address
        self.at_once = 1
        self._expected: Expected | None = None
        self._counted = 0.0
        self._alone_since: float | None = None
        self._lock = threading.Lock()

    def prepare(self, store: Store, inputs: Mapping[Path, str], progress: Progress) -> None:
        """Connect, and see whether the workers can make what this process would.

        Raises:
            ConfigError: there is no such cluster, or a worker that cannot; names it and says what it lacks.
        """
        self._connect()
        self._expected = Expected.of_this(store, inputs)
        workers = self._workers()
        if not workers:
            raise ConfigError(f"the cluster {self} has no workers", hint="start some")
        asked = {self._submit("look around", look, (self._expected,), one): one for one in workers}
        answers = self._answers(asked, progress)
        if unfit := [one for one in answers if isinstance(one, Unfit)]:
            raise _refused(unfit)
        self.at_once = len(workers)
        names = ", ".join(sorted(one.where for one in answers))
        progress.tell(f"steps are run by {self}: {names}")

    def run(self, store: Store, jobs: Sequence[Job], progress: Progress) -> None:
        with EventLog(store) as log, Watching(log, progress) as watching:
            by_name = {job.name: job for job in jobs}
            tried = dict.fromkeys(by_name, 1)
            pending = {self._begin(job, log): job.name for job in jobs}
            raised: dict[str, MtuError] = {}
            while pending:
                self._require_workers(progress)
                ended = self._ended(pending)
                watching.look()
                for task in ended:
                    name = pending.pop(task)
                    try:
                        outcome = self._outcome(task)
                        if isinstance(outcome, Unfit):
                            raise _refused([outcome])
                        if isinstance(outcome, Lost):
                            if tried[name] == TRIES:
                                raise _killed(by_name[name].title, outcome.where)
                            tried[name] += 1
                            pending[self._begin(by_name[name], log)] = name
                    except MtuError as error:
                        raised[name] = error
                if not ended:
                    time.sleep(POLL)
        for name in by_name:
            if name in raised:
                raise raised[name]

    def __str__(self) -> str:
        return f"{self.scheme}://{self.address}"

    @abstractmethod
    def close(self) -> None:
        """Leave the cluster; what still runs there for this build ends when its store is closed."""

    @abstractmethod
    def _connect(self) -> None:
        """Raises ConfigError: nobody answers within ``ANSWER`` seconds."""

    @abstractmethod
    def _workers(self) -> list[str]:
        """Those that live, by what ``_submit`` and people know them as; ConfigError for one that cannot be used."""

    @abstractmethod
    def _submit(self, title: str, function: Callable[..., Any], given: tuple[Any, ...], worker: str | None) -> Any:
        """A task that calls ``function``, on ``worker`` or anywhere, and anew elsewhere if that worker is lost."""

    @abstractmethod
    def _ended(self, tasks: Iterable[Any]) -> list[Any]:
        """Those of ``tasks`` that have come to an end, at once."""

    @abstractmethod
    def _result(self, task: Any, lost: type[Exception]) -> Any:
        """What a task that has ended returned.

        Raises:
            lost: every worker that it was run on was lost; with where that was.
            Left: the cluster is not there any more.
            Exception: what the task raised.
        """

    def _begin(self, job: Job, log: EventLog) -> Any:
        return self._submit(job.title, perform_there, (job, log.of(job.name), self._expected), None)

    def _outcome(self, task: Any) -> Done | Unfit | Lost:
        """The result of a task; an ``MtuError`` for whatever else became of it but an error of ours."""
        try:
            result: Done | Unfit | Lost = self._result(task, _EveryWorkerLost)
            return result
        except _EveryWorkerLost as error:
            raise _killed(*error.args) from error
        except ModuleNotFoundError as error:
            hint = "install the same version of mtu-compile on every worker"
            raise ConfigError(f"a worker of {self} cannot import {error.name}", hint=hint) from error
        except Left as error:
            hint = "what was made is kept in the cache: build again, and it goes on from there"
            raise MtuError(f"the cluster {self} is gone", hint=hint) from error

    def _answers(self, asked: Mapping[Any, str], progress: Progress) -> list[Done | Unfit | Lost]:
        """What workers say of themselves; those that are busy are asked again with each step."""
        began, pending, answers = time.monotonic(), dict(asked), list[Done | Unfit | Lost]()
        while pending:
            for task in self._ended(pending):
                del pending[task]
                answers.append(self._outcome(task))
            if answers and time.monotonic() - began > LOOK_AROUND:
                break
            self._require_workers(progress)
            time.sleep(POLL)
        return answers

    def _require_workers(self, progress: Progress) -> None:
        """``MtuError`` if there have been no workers for a while."""
        with self._lock:
            now = time.monotonic()
            if now - self._counted < COUNT:
                return
            self._counted = now
            if self._workers():
                self._alone_since = None
                return
            if self._alone_since is None:
                self._alone_since = now
                progress.note(f"the cluster {self} has no workers any more; waiting for some")
            elif now - self._alone_since > ALONE:
                hint = "start some and build again: it goes on where it was"
                raise MtuError(f"the cluster {self} has had no workers for {ALONE:.0f} seconds", hint=hint)


class _EveryWorkerLost(Exception):
    """A task was given up."""


def _refused(unfit: Sequence[Unfit]) -> ConfigError:
    said = "; ".join(f"{one.where} {', '.join(one.why)}" for one in unfit)
    hint = (
        "workers need the build's versions, CPU and settings, and its cache and model at the same paths (--cache DIR)"
    )
    return ConfigError(f"a build cannot use this cluster: {said}", hint=hint)


def _killed(title: str, where: str) -> MtuError:
    return MtuError(
        f"{title} was killed wherever it was tried, at last by {where}: most likely there is too little memory",
        hint="`mtu-compile plan` says how much a build needs; what was made before is kept for the next try",
    )
