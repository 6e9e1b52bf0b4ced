"""What steps in other processes say of their progress: lines in a file of the store, which the build reads."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mtu_compile.core.progress import Advance, Progress
from mtu_compile.steps.store import Store


class EventLog:
    """A folder for the lines of each job of those that were begun together, for as long as they run."""

    def __init__(self, store: Store) -> None:
        self.folder = store.events / secrets.token_hex(4)

    def __enter__(self) -> EventLog:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # others are at work
            self.folder.parent.rmdir()

    def of(self, name: str) -> Path:
        """Where the job called ``name`` writes."""
        return self.folder / f"{name}.jsonl"


class Told(Progress):
    """Progress that is written down for somebody else to read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, title: str, where: str) -> None:
        """The job called ``title`` is begun by ``where``, maybe after somebody else was lost with it."""
        self._say("begin", title, where)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        self._say("stage", title, total)
        try:
            yield lambda units: self._say("advance", units)
        finally:
            self._say("end")

    def note(self, message: str) -> None:
        self._say("note", message)

    def tell(self, message: str) -> None:
        self._say("tell", message)

    def _say(self, *what: Any) -> None:
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:  # nobody may be reading any more
            file.write(json.dumps(what) + "\n")


class Watching:
    """Reads what jobs say, and says it to ``progress``; a context, after which no job says anything any more.

    A terminal draws the bars of one job. Of others that run at once it is told when a stage of theirs begins.
    """

    def __init__(self, log: EventLog, progress: Progress) -> None:
        self.log, self.progress = log, progress
        self._read: dict[Path, int] = {}
        self._where: dict[Path, str] = {}
        self._drawn: Path | None = None
        self._stages: list[tuple[ExitStack, Advance]] = []

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.look()
        self._end_stages()

    def look(self) -> None:
        """Say whatever is new."""
        for path in sorted(self.log.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                self._say(path, *json.loads(line))

    def _say(self, path: Path, kind: str, *what: Any) -> None:
        if kind == "begin":
            self._begin(path, *what)
        elif kind == "note":
            self.progress.note(*what)
        elif kind == "tell":
            self.progress.tell(*what)
        elif kind == "stage" and self._drawn in (None, path):
            stack = ExitStack()
            self._drawn = path
            self._stages.append((stack, stack.enter_context(self.progress.stage(*what))))
        elif kind == "stage":
            self.progress.tell(f"{what[0]} …")
        elif self._drawn == path and self._stages:
            if kind == "advance":
                self._stages[-1][1](*what)
            else:
                self._stages.pop()[0].close()
                self._drawn = path if self._stages else None

    def _begin(self, path: Path, title: str, where: str) -> None:
        if path in self._where:
            self.progress.note(f"{self._where[path]} was lost; {title} is run again by {where}")
            if self._drawn == path:
                self._end_stages()
        self._where[path] = where

    def _end_stages(self) -> None:
        while self._stages:
            self._stages.pop()[0].close()
        self._drawn = None
