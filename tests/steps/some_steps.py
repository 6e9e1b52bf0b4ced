"""Steps that the tests run; each leaves a mark in ``marks``, a folder, of every time it is run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mtu_compile.core.errors import NotFiniteError
from mtu_compile.steps import NOT_CONTENT, Work, step


@dataclass(frozen=True)
class Marks:
    """Where steps say that they are run; no part of what their results are made of."""

    folder: Path = field(metadata=NOT_CONTENT)

    def add(self, name: str) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{name}-{os.getpid()}-{time.time_ns()}").touch()

    def count(self, name: str) -> int:
        return len(list(self.folder.glob(f"{name}-*")))


@dataclass(frozen=True)
class Text:
    """A file, and what is known of it."""

    file: Path
    letters: int


@step()
def written(work: Work, words: str, marks: Marks) -> Text:
    """The words, in a file."""
    marks.add("written")
    file = work.folder / "text"
    file.write_text(words)
    return Text(file, len(words))


@step(tools=("numpy",), cpu=True)
def repeated(work: Work, text: Text, times: int, marks: Marks) -> Mapping[str, Text]:
    """A text several times over."""
    marks.add("repeated")
    file = work.folder / "texts" / "repeated"
    file.parent.mkdir()
    file.write_text(text.file.read_text() * times)
    return {"repeated": Text(file, text.letters * times)}


@step()
def failed(work: Work, words: str) -> None:
    """No result, but half a file."""
    (work.folder / "half").write_text(words)
    raise NotFiniteError(words, network="unet", task="t2i", step=3, hint="try another")


@step()
def drawn(work: Work, units: int) -> int:
    """The process it was run in, which says how far it is."""
    with work.progress.stage("draw", units) as advance:
        for _ in range(units):
            advance(1)
    work.progress.note("drawn")
    return os.getpid()


@step(one_core=True)
def met(work: Work, name: str, other: str, marks: Marks) -> int:
    """The process it was run in, after another step was seen at work."""
    marks.add(name)
    for _ in range(2000):
        if marks.count(other):
            return os.getpid()
        time.sleep(0.02)
    raise TimeoutError(f"{other} was never run beside {name}")


@step()
def killed(work: Work) -> None:
    """No result: its process is ended as by a system that is out of memory."""
    os.kill(os.getpid(), signal.SIGKILL)


@step()
def awaited(work: Work, words: str, marks: Marks) -> Path:
    """Ends when there is a file called ``go`` beside the marks."""
    (work.folder / "text").write_text(words)
    marks.add("awaited")
    while not (marks.folder / "go").exists():
        time.sleep(0.02)
    return work.folder / "text"


@step()
def killed_once(work: Work, marks: Marks) -> int:
    """How often it was begun; the first time, its process is ended."""
    marks.add("killed_once")
    if marks.count("killed_once") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return marks.count("killed_once")
