"""Real clusters of two workers on this machine, and builds on them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


def until(ready: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for it; a limit against what hangs, no measure."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if ready():
            return
        time.sleep(0.02)
    raise AssertionError(f"it did not happen within {seconds:.0f} seconds")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass
class DaskCluster:
    """A scheduler and workers, each a process."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = 0

    @property
    def name(self) -> str:
        return f"dask://127.0.0.1:{self.port}"

    def start(self, *words: object, **environment: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *map(str, words)],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": path, **environment},
            )
        self.processes.append(process)
        return process

    def scheduler(self) -> None:
        self.port = free_port()
        place = ("--host", "127.0.0.1", "--port", self.port, "--no-dashboard")
        self.start("distributed.cli.dask_scheduler", *place)

    def worker(self, *words: object, threads: int = 1, **environment: str) -> subprocess.Popen[bytes]:
        place = ("--no-dashboard", "--no-nanny", "--nthreads", threads, "--death-timeout", 60)
        return self.start("distributed.cli.dask_worker", f"127.0.0.1:{self.port}", *place, *words, **environment)

    def wait_for(self, workers: int) -> None:
        from distributed import Client

        with Client(f"tcp://127.0.0.1:{self.port}", timeout=60, set_as_default=False) as client:
            until(lambda: len(client.nthreads()) == workers)

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


@contextmanager
def dask_cluster(folder: Path, workers: int = 2) -> Iterator[DaskCluster]:
    """A Dask cluster on this machine, none of whose processes is left."""
    folder.mkdir(exist_ok=True)
    cluster = DaskCluster(folder)
    try:
        cluster.scheduler()
        for _ in range(workers):
            cluster.worker()
        cluster.wait_for(workers)
        yield cluster
    finally:
        cluster.close()


@dataclass
class RayCluster:
    """A head and a second node, which are processes of this machine."""

    port: int
    processes: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"ray://127.0.0.1:{self.port}"
