"""Runs calls of steps: what is kept is taken, what is missing is made, and what was made of what is remembered."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from mtu_compile.core.errors import MtuError
from mtu_compile.core.progress import Progress
from mtu_compile.steps.entry import Damaged, Entry
from mtu_compile.steps.executors import Executor, InThisProcess, executor_for
from mtu_compile.steps.key import digest, made_of
from mtu_compile.steps.perform import Job
from mtu_compile.steps.step import Call
from mtu_compile.steps.store import Store
from mtu_compile.steps.together import Locks, SharedProgress, all_at_once
from mtu_compile.steps.value import from_json

R = TypeVar("R")
S = TypeVar("S")
T = TypeVar("T")

#: Seconds; of what took less nobody needs to hear that it was there already.
WORTH_A_LINE = 0.1


@dataclass(frozen=True)
class Ran:
    """What became of a call.

    Attributes:
        step: name of the step.
        title: of the call, for people.
        cached: its result was there, or another build was just making it.
        seconds: what making the result took, now or when it was made.
    """

    step: str
    title: str
    cached: bool
    seconds: float


class Steps:
    """Runs the steps of one build, or of several at once.

    Args:
        store: where results are kept; open.
        progress: told of every step.
        executor: where steps are run that have to be.

    Attributes:
        ran: every call, in order (see ``again``).
    """

    def __init__(self, store: Store, progress: Progress, executor: Executor | None = None) -> None:
        self.store, self.progress = store, progress
        self.executor: Executor = executor or InThisProcess()
        self._named: tuple[str, int] | None = None
        self.ran: list[Ran] = []
        self._known: dict[Path, str] = {}
        self._made: dict[str, tuple[Call[Any], Entry]] = {}
        self._intact: set[str] = set()
        self._locks = Locks()

    def use(self, name: str, weights: int, inputs: Mapping[Path, str] | None = None) -> None:
        """Run steps by the executor called ``name`` from now on, those of a model of so many bytes of weights.

        Args:
            inputs: hashes of model folders that steps read, beside what they were told to ``know``.

        Raises:
            ConfigError: there is no such executor, or it cannot run them.
        """
        if self._named != (name, weights):
            self.executor.close()
            self.executor, self._named = executor_for(name, weights), (name, weights)
            self.executor.prepare(self.store, {**self._known, **(inputs or {})}, self.progress)

    @property
    def in_turn(self) -> bool:
        """Whether one thing is done after the other."""
        return self.executor.at_once == 1

    def each(self, work: Callable[[Steps, T], R], over: Sequence[T]) -> list[R]:
        """``work`` of each of ``over``, which do not depend on each other: at once where the executor has room for it.

        Args:
            work: is given steps to run its own by; what these ``ran`` is put together in the order of ``over``.

        Raises:
            Exception: the first that ``work`` raised; if all are at work at once, after the others came to their end.
        """
        branches = [copy(self) for _ in over]
        progress = self.progress if isinstance(self.progress, SharedProgress) else SharedProgress(self.progress)
        for branch in branches:
            branch.ran = []
            branch.progress = self.progress if self.in_turn else progress
        pairs = list(zip(branches, over, strict=True))
        if self.in_turn:
            done = [work(branch, one) for branch, one in pairs]
        else:
            done = all_at_once(lambda pair: work(*pair), pairs, self.executor.close)
        self.ran += [ran for branch in branches for ran in branch.ran]
        return done

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this process itself computes: one thing at a time."""
        with self._locks.held("this process"):
            yield

    def close(self) -> None:
        """End what still runs."""
        self.executor.close()

    def again(self, ran: Sequence[Ran] = ()) -> None:
        """What is run from now on is another result's, of which so much was run before."""
        self.ran = list(ran)

    def know(self, path: Path, sha256: str) -> Path:
        """``path``, a file or folder from outside, is this by its content; steps may be given it."""
        self._known[path] = sha256
        return path

    def run(self, call: Call[R]) -> R:
        """The result of one step; see ``run_all``."""
        return self.run_all([call])[0]

    def run_both(self, one: Call[R], other: Call[S]) -> tuple[R, S]:
        """The results of two steps that do not depend on each other; see ``run_all``."""
        both: list[Any] = self.run_all([one, other])
        return both[0], both[1]

    def run_all(self, calls: Sequence[Call[R]]) -> list[R]:
        """The results of steps that do not depend on each other.

        Raises:
            MtuError: as the steps do; what others of ``calls`` made is kept all the same.
        """
        names = [self._name(call) for call in calls]
        if missing := [call for name, call in zip(names, calls, strict=True) if self.store.find(name) is None]:
            for call in missing:
                self._verify_inputs(call.given)
            names = [self._name(call) for call in calls]  # an input that had to be made again may be another now
        made: set[str] = set()
        if missing:
            with self._locks.held(*set(names)):  # another thread may be making the same
                jobs = {
                    name: self._job(name, call)
                    for name, call in zip(names, calls, strict=True)
                    if self.store.find(name) is None
                }
                if jobs:
                    self.executor.run(self.store, list(jobs.values()), self.progress)
                made = set(jobs)
        return [self._result(name, call, name not in made) for name, call in zip(names, calls, strict=True)]

    def place(self, path: Path, destination: Path) -> Path:
        """``path``, a file or folder of a result, copied to ``destination``, after every byte of it was verified."""
        self.intact(path)
        destination.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            return Path(shutil.copytree(path, destination, copy_function=shutil.copyfile, dirs_exist_ok=True))
        return Path(shutil.copyfile(path, destination))

    def intact(self, path: Path) -> Path:
        """``path`` of a result, after all of that result was verified, and made again if it had been damaged."""
        name = self._entry_of(path)
        if name is not None and name not in self._intact:
            with self._locks.held(name):
                self._make_intact(name)
        return path

    def _make_intact(self, name: str) -> None:
        if name in self._intact:
            return
        call, entry = self._made[name]
        try:
            entry.verify()
        except (Damaged, OSError):
            self.store.remove(name)
            self.progress.tell(f"{call.title}: what was kept is damaged, and is made again")
            self._verify_inputs(call.given)
            self.executor.run(self.store, [self._job(name, call)], self.progress)
            self._result(name, call, cached=False)
        self._intact.add(name)

    def release(self, *paths: Path) -> None:
        """These results are not needed any more, and are removed where nothing is to be kept."""
        if self.store.temporary:
            for name in {name for path in paths if (name := self._entry_of(path)) is not None}:
                self.store.remove(name)

    def _name(self, call: Call[Any]) -> str:
        return f"{call.step.name}-{digest(made_of(call, self._identify))[:32]}"

    def _job(self, name: str, call: Call[Any]) -> Job:
        content = made_of(call, self._identify)
        return Job(self.store.root, name, call.title, call.step.place, call.given, content, self.store.build)

    def _result(self, name: str, call: Call[R], cached: bool) -> R:
        entry = self.store.wait_for(name)  # another build may be looking at it just now
        if entry is None:
            raise MtuError(f"{call.title}: what was made is gone", hint="is something else clearing the cache?")
        self._made[name] = (call, entry)
        cached = cached or entry.build != self.store.build
        if not cached:
            self._intact.add(name)
        elif entry.seconds >= WORTH_A_LINE:
            self.progress.tell(f"{call.title}: cached")
        self.ran.append(Ran(call.step.name, call.title, cached, entry.seconds))
        result: R = from_json(call.step.returns, entry.value, entry.folder)
        return result

    def _identify(self, path: Path) -> str:
        if path in self._known:
            return self._known[path]
        if (name := self._entry_of(path)) is not None:
            return self._made[name][1].identity(path)
        raise TypeError(f"nothing says what is in {path}, which a step is given")

    def _entry_of(self, path: Path) -> str | None:
        entries = self.store.root / "entries"
        if not path.is_relative_to(entries) or path == entries:
            return None
        name = path.relative_to(entries).parts[0]
        return name if name in self._made else None

    def _verify_inputs(self, value: Any) -> None:
        """Whatever of ``value`` is a file of a result has to be intact before it is read."""
        for path in _paths(value):
            self.intact(path)


def _paths(value: Any) -> list[Path]:
    """The paths in what a step is given."""
    if isinstance(value, Path):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        return [path for one in fields(value) for path in _paths(getattr(value, one.name))]
    if isinstance(value, Mapping):
        return [path for part in value.values() for path in _paths(part)]
    if isinstance(value, (list, tuple)):
        return [path for part in value for path in _paths(part)]
    return []
