"""Memory of a command and all it starts, by the stages it reports, out of ``/proc`` (Linux)."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Seconds between two looks.
PERIOD = 0.1

#: What a stage that has ended writes on stderr: "passes all tasks: 12.3 s".
_STAGE = re.compile(r"(?P<title>.+): (?P<seconds>\d+(?:\.\d+)?) s")

_PAGES = re.compile(r"^(RssAnon|RssFile|RssShmem):\s+(\d+) kB$", re.MULTILINE)


@dataclass
class Memory:
    """Peaks in bytes.

    Attributes:
        own: anonymous and shared memory of the process that had most of it, which nothing can take back.
        mapped: pages of files that the process with most of them had mapped; the system drops them when it needs room.
        resident: all of the largest process.
        together: anonymous and shared memory of all processes at once.
    """

    own: int = 0
    mapped: int = 0
    resident: int = 0
    together: int = 0

    def include(self, other: Memory) -> None:
        """Become the larger of both in everything."""
        for name, value in vars(other).items():
            setattr(self, name, max(getattr(self, name), value))

    def gigabytes(self) -> dict[str, float]:
        return {name: round(value / 1e9, 2) for name, value in vars(self).items()}


@dataclass
class Watched:
    """What a command took.

    Attributes:
        seconds: from start to end.
        memory: of the whole of it.
        stages: by title, seconds and memory; what happens between two stages counts to the later.
        log: its stderr.
    """

    seconds: float = 0.0
    memory: Memory = field(default_factory=Memory)
    stages: dict[str, tuple[float, Memory]] = field(default_factory=dict)
    log: str = ""


def watch(command: Sequence[str]) -> Watched:
    """Run ``command``; ``CalledProcessError`` if it fails."""
    seen, current, lock = Watched(), Memory(), threading.Lock()
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        done = threading.Event()

        def look() -> None:
            while not done.wait(PERIOD):
                now = _measure(process.pid)
                with lock:
                    current.include(now)

        looking = threading.Thread(target=look)
        looking.start()
        try:
            assert process.stderr is not None
            for line in process.stderr:
                seen.log += line
                if match := _STAGE.fullmatch(line.strip()):
                    with lock:
                        taken = Memory(**vars(current))
                        vars(current).update(vars(Memory()))
                    _add(seen, match["title"], float(match["seconds"]), taken)
            process.wait()
        finally:
            done.set()
            looking.join()
    _add(seen, "rest", 0.0, current)
    seen.seconds = time.monotonic() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), stderr=seen.log)
    return seen


def _add(seen: Watched, title: str, seconds: float, memory: Memory) -> None:
    before, peak = seen.stages.get(title, (0.0, Memory()))
    peak.include(memory)
    seen.stages[title] = (before + seconds, peak)
    seen.memory.include(memory)


def _measure(root: int) -> Memory:
    parts = [found for pid in _tree(root) if (found := _pages(pid))]
    own = [one["RssAnon"] + one["RssShmem"] for one in parts]
    return Memory(
        max(own, default=0),
        max((one["RssFile"] for one in parts), default=0),
        max((sum(one.values()) for one in parts), default=0),
        sum(own),
    )


def _pages(pid: int) -> dict[str, int]:
    """Bytes of a process by kind; nothing if it has gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = {name: int(number) * 1024 for name, number in _PAGES.findall(text)}
    return found if len(found) == 3 else {}


def _tree(root: int) -> list[int]:
    """``root`` and its descendants."""
    pids, todo = [], [root]
    while todo:
        pid = todo.pop()
        pids.append(pid)
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            todo += [int(one) for task in tasks for one in (task / "children").read_text().split()]
        except OSError:
            continue
    return pids
