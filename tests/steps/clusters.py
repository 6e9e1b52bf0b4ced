"""Real clusters of two workers on this machine, and builds on them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mtu_compile.core.errors import ConfigError
from mtu_compile.steps.executors.on_ray import OnRay
from tests.waiting import until

ROOT = Path(__file__).parents[2]


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

    def kill(self, worker: int) -> None:
        """End a worker, and start another."""
        (process,) = (one for one in self.processes if one.pid == worker)
        process.kill()
        process.wait()
        self.worker()

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


RAY_START = "import sys; from ray.scripts.scripts import main; sys.argv.insert(1, 'start'); main()"


@dataclass
class RayCluster:
    """A head and a second node, each of which runs one step at a time, in processes of this machine."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = 0

    @property
    def name(self) -> str:
        return f"ray://127.0.0.1:{self.port}"

    def start(self, *words: object) -> None:
        path, log = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), self.folder / "log"
        begun = log.read_text().count("Ray runtime started") if log.exists() else 0
        common = ("--block", "--num-cpus", 1, "--object-store-memory", 80_000_000, "--disable-usage-stats")
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", RAY_START, *map(str, (*common, *words))],
                stdout=file,
                stderr=file,
                # what its server of clients is given to start, which on a busy machine takes more than half a minute
                env={**os.environ, "PYTHONPATH": path, "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "300"},
            )
        self.processes.append(process)
        until(lambda: process.poll() is not None or log.read_text().count("Ray runtime started") > begun, 180)

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()  # which ends what it began
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self, worker: int) -> None:
        """End the process of a worker; Ray starts another."""
        os.kill(worker, signal.SIGKILL)


class DidNotStart(Exception):
    """This machine does not run such a cluster."""


@contextmanager
def ray_cluster(folder: Path) -> Iterator[RayCluster]:
    """A Ray cluster of two nodes on this machine, none of whose processes is left."""
    folder.mkdir(exist_ok=True)
    cluster = RayCluster(folder)
    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # paths of sockets may not be long
        try:
            port, cluster.port = free_port(), free_port()
            head = ("--head", "--port", port, "--ray-client-server-port", cluster.port, "--temp-dir", short)
            cluster.start(*head, "--include-dashboard=false")
            cluster.start("--address", f"127.0.0.1:{port}")
            if any(process.poll() is not None for process in cluster.processes):
                raise DidNotStart((folder / "log").read_text()[-500:])
            first = OnRay(cluster.name.partition("//")[2])
            try:
                first._connect()
            except ConfigError as error:
                raise DidNotStart(error.message) from error
            first.close()
            yield cluster
        finally:
            cluster.close()
