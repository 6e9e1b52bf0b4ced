"""Time and memory of a command and all it starts, by the stages it reports, out of ``/proc`` (Linux)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
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
class Taken:
    """What a stage took; what happens between two stages counts to the later.

    Attributes:
        said: seconds, as the stage itself reports them.
        seconds: since the stage before ended.
        cpu: seconds of all cores, user and system; on a busy machine they say more than ``seconds``.
        memory: peaks.
    """

    said: float = 0.0
    seconds: float = 0.0
    cpu: float = 0.0
    memory: Memory = field(default_factory=Memory)

    def include(self, other: Taken) -> None:
        """Become both together."""
        self.said, self.seconds, self.cpu = self.said + other.said, self.seconds + other.seconds, self.cpu + other.cpu
        self.memory.include(other.memory)

    def figures(self) -> dict[str, float]:
        """Seconds, and gigabytes."""
        return {"seconds": round(self.seconds, 1), "cpu": round(self.cpu, 1), **self.memory.gigabytes()}


@dataclass
class Watched:
    """What a command took.

    Attributes:
        whole: from start to end.
        stages: by title.
        log: its stderr.
        code: it ended with.
    """

    whole: Taken = field(default_factory=Taken)
    stages: dict[str, Taken] = field(default_factory=dict)
    log: str = ""
    code: int = 0


def watch(command: Sequence[str], *, echo: bool = False, check: bool = True) -> Watched:
    """Run ``command``.

    Args:
        echo: pass its stderr on, line by line.
        check: ``CalledProcessError`` if it fails; else what was seen until then is returned all the same.
    """
    seen, current, lock = Watched(), Memory(), threading.Lock()
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        done, before, cpu_before = threading.Event(), began, 0.0

        def look() -> None:
            while not done.wait(PERIOD):
                now = _measure(process.pid)
                with lock:
                    current.include(now)

        def ended(title: str, said: float) -> None:
            nonlocal before, cpu_before
            # A process that is ended between two looks takes its last tenth of a second along.
            now, cpu = time.monotonic(), max(_cpu(process.pid), cpu_before)
            with lock:
                taken = Taken(said, now - before, cpu - cpu_before, Memory(**vars(current)))
                vars(current).update(vars(Memory()))
            before, cpu_before = now, cpu
            seen.stages.setdefault(title, Taken()).include(taken)
            seen.whole.include(taken)

        looking = threading.Thread(target=look)
        looking.start()
        try:
            assert process.stderr is not None
            for line in process.stderr:
                seen.log += line
                if echo:
                    print(line, end="", file=sys.stderr, flush=True)
                if match := _STAGE.fullmatch(line.strip()):
                    ended(match["title"], float(match["seconds"]))
            ended("rest", 0.0)
            process.wait()
        finally:
            done.set()
            looking.join()
    seen.code = process.returncode
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command), stderr=seen.log)
    return seen


def _cpu(root: int) -> float:
    """Seconds of CPU that ``root`` and its descendants have used, those that have ended among them."""
    ticks = 0
    for pid in _tree(root):
        try:
            # The second field, a name in brackets, may hold anything.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


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
