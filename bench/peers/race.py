"""The measurement: contenders in turn, each interleaved with the first, which stays loaded throughout."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.peers.contenders import Contender

#: Steps of the short and of the whole picture: a step is what the whole takes longer, by step.
SHORT, STEPS = 2, 10
#: Tasks of the multi-task network, for which others hold a UNet each.
TASKS = 4
#: No answer for so long is a failure, in seconds.
PATIENCE = 3600.0


class Refused(Exception):
    """A contender could not do what it was told; the message is its own."""


class Process:
    """A contender's process."""

    def __init__(self, one: Contender, root: Path, size: int, log: Path) -> None:
        here = Path(__file__).parent
        options, folder = json.dumps(dict(one.options)), root / one.folder
        command = [
            f"{one.environment}/bin/python",
            str(here / "worker.py"),
            one.module,
            str(folder),
            str(size),
            options,
        ]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a")
        path = os.pathsep.join(filter(None, [str(here.parent.parent), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def tell(self, do: str, **arguments: object) -> dict[str, Any]:
        """The answer to a command.

        Raises:
            Refused: it failed, or gave no answer.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(PATIENCE, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError as error:
            raise Refused(f"its process is gone: {error}") from error
        finally:
            watchdog.cancel()
        if not line:
            raise Refused(f"its process ended with {self._process.wait()} at {do!r}")
        answer = dict(json.loads(line))
        if "error" in answer:
            raise Refused(answer["error"])
        return answer


class TreePeak:
    """The most memory a process and its children hold together, polled: each stage of a build has its own process."""

    def __init__(self, pid: int, every: float = 0.5) -> None:
        self.bytes, self._pid, self._every, self._done = 0, pid, every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> TreePeak:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._done.wait(self._every):
            try:
                root = psutil.Process(self._pid)
                tree = [root, *root.children(recursive=True)]
                self.bytes = max(self.bytes, sum(_pss(one.pid) for one in tree))
            except psutil.Error:
                continue


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return 0


def prepare(one: Contender, models: Sequence[Path], root: Path, size: int, log: Path) -> dict[str, Any]:
    """Make a contender's files of (our model, theirs), unless they are there; what it took, or the error."""
    folder, record = root / one.folder, root / f"{one.folder}.json"
    if record.exists() and (found := json.loads(record.read_text())).get("error") is None:
        return dict(found)
    found = {}
    try:
        with Process(one, root, size, log) as process, TreePeak(process.pid) as peak:
            answer = process.tell("prepare", model=str(models[0 if one.ours else 1]))
        found = {f"prepare_{key}": answer[key] for key in ("seconds", "cpu_seconds")}
        found["prepare_peak_bytes"] = peak.bytes
        found["disk_bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if (linked := folder / "model").is_symlink():
            used = [file for part in ("unet", "vae", "text_encoder") for file in (linked / part).rglob("*.safetensors")]
            found["disk_bytes"] = sum(file.stat().st_size for file in used)
    except Refused as error:
        found["error"] = str(error)
    if one.shares is None:
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(found))
    return found


def memory_of_tasks(one: Contender, root: Path, size: int, log: Path) -> dict[str, Any]:
    """Resident UNets of one task and of four; the time to open another and make its first step."""
    found: dict[str, Any] = {}
    try:
        for name, count in (("one", 1), ("four", TASKS)):
            with Process(one, root, size, log) as process:
                # The library itself is not the networks'.
                before = process.tell("unets", count=0)["resident_bytes"]
                answer = process.tell("unets", count=count)
            found[f"unets_{name}_bytes"] = answer["resident_bytes"] - before
            if count == 1:
                found["open_unet_seconds"] = answer["seconds"]
    except Refused as error:
        found["unets_error"] = str(error)
    return found


def race(
    contenders: Sequence[Contender], root: Path, size: int, rounds: int, log: Path, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Loading, pictures and steps of each, in turn with the first contender's."""
    first, *others = contenders
    found: dict[str, dict[str, Any]] = {}
    with Process(first, root, size, log) as ours:
        found[first.name] = _load(ours)
        for one in others:
            say(one.name)
            try:
                with Process(one, root, size, log) as process:
                    found[one.name] = {**_load(process), **_interleave(ours, process, rounds, one.name)}
            except Refused as error:
                found[one.name] = {"error": str(error)}
    beside = [one["beside"] for one in found.values() if "beside" in one]
    if beside:
        found[first.name].update({key: median(one[key] for one in beside) for key in ("image_seconds", "step_seconds")})
    return found


def _load(process: Process) -> dict[str, Any]:
    before = process.tell("unets", count=0)["resident_bytes"]
    began = time.perf_counter()
    process.tell("load")
    opened = time.perf_counter() - began
    first = process.tell("image", steps=SHORT)
    return {
        "load_seconds": opened,
        "first_image_seconds": first["seconds"],
        "resident_bytes": first["resident_bytes"] - before,
    }


def _interleave(ours: Process, process: Process, rounds: int, beside: str) -> dict[str, Any]:
    seconds: dict[tuple[str, int], list[float]] = {}
    both = {"ours": ours, "theirs": process}
    for turn in range(rounds + 1):
        order = list(both.items()) if turn % 2 else list(both.items())[::-1]
        for who, one in order:
            for steps in (SHORT, STEPS):
                # No prompt twice: a library may remember what its text encoder made of one.
                prompt = f"a red apple on a table, {beside} {turn} {steps}"
                taken = one.tell("image", steps=steps, seed=turn, prompt=prompt)["seconds"]
                if turn:  # the first round warms up
                    seconds.setdefault((who, steps), []).append(taken)
    step = {
        who: [(a - b) / (STEPS - SHORT) for a, b in zip(seconds[who, STEPS], seconds[who, SHORT], strict=True)]
        for who in both
    }
    image = {who: seconds[who, STEPS] for who in both}
    return {
        "image_seconds": median(image["theirs"]),
        "step_seconds": median(step["theirs"]),
        "beside": {"image_seconds": median(image["ours"]), "step_seconds": median(step["ours"])},
        # Of what they take: below 1, the first contender is faster.
        "image_ratio": median(a / b for a, b in zip(image["ours"], image["theirs"], strict=True)),
        "step_ratio": median(step["ours"]) / median(step["theirs"]),
    }
