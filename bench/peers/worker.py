"""A contender's process: does what it is told on standard input, a JSON object a line, and answers so.

    python worker.py MODULE FOLDER SIZE OPTIONS

Nothing of this project is imported here, as peers' environments do not have it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any


def resident_bytes() -> int:
    """This process's share of the machine's memory, files it has mapped included (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def peak_bytes() -> int:
    """The most that was resident at any time since ``forget_peak``, children not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def cpu_seconds() -> float:
    """What this process and its children that have ended have computed: the same on a busy machine."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


class Worker:
    """The commands."""

    def __init__(self, module: Any, folder: Path, size: int, options: dict[str, str]) -> None:
        self._module, self._folder, self._size, self._options = module, folder, size, options
        self._pipeline: Any = None
        self._kept: Any = None

    def prepare(self, model: str) -> dict[str, Any]:
        """Make the contender's files."""
        self._module.prepare(Path(model), self._folder, self._size, self._options)
        return {}

    def load(self) -> dict[str, Any]:
        """Open everything, make a first picture."""
        self._pipeline = self._module.Pipeline(self._folder, self._size, self._options)
        return {}

    def image(self, steps: int, prompt: str = "a red apple on a table", seed: int = 0, out: str = "") -> dict[str, Any]:
        """Make a picture, with guidance; ``out`` is where it is to be kept."""
        picture = self._pipeline(prompt, steps, seed)
        if picture.size != (self._size, self._size):
            raise ValueError(f"a picture of {picture.size}, not of {self._size}")
        if out:
            picture.save(out)
        return {}

    def unets(self, count: int) -> dict[str, Any]:
        """Hold UNets for ``count`` tasks, each run once."""
        self._kept = self._module.unets(self._folder, self._size, self._options, count) if count else None
        return {}

    def run(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command, with its time and what is resident afterwards."""
        began, computed = time.perf_counter(), cpu_seconds()
        found = getattr(self, command.pop("do"))(**command)
        found |= {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - computed}
        gc.collect()
        return {**found, "resident_bytes": resident_bytes(), "peak_bytes": peak_bytes()}


def main() -> None:
    name, folder, size, options = sys.argv[1:]
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).parent / "libraries"))
    worker = None
    for line in sys.stdin:
        try:
            if worker is None:
                worker = Worker(importlib.import_module(name), Path(folder), int(size), json.loads(options))
            answer = worker.run(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
