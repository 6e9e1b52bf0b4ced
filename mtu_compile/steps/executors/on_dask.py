"""Steps on a Dask cluster (``distributed``)."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from mtu_compile.core.errors import ConfigError, first_line
from mtu_compile.steps.executors.cluster import ANSWER, Cluster, Left


class OnDask(Cluster):
    """Runs jobs on the workers of a Dask scheduler.

    Dask runs a task again whose worker was lost, and gives it up after ``distributed.scheduler.allowed-failures``.
    """

    scheme = "dask"
    _client: Any = None

    def _connect(self) -> None:
        from distributed import Client

        warnings.filterwarnings("ignore", message="Sending large graph")  # pictures to calibrate with
        try:
            self._client = Client(f"tcp://{self.address}", timeout=ANSWER, set_as_default=False, name="mtu-compile")
        except (OSError, TimeoutError) as error:
            raise ConfigError(
                f"no Dask scheduler answers at {self.address}: {first_line(error)}",
                hint="start one with `dask scheduler`",
            ) from error

    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close(timeout=ANSWER)

    def _workers(self) -> list[str]:
        if self._client is None:
            return []
        threads: dict[str, int] = self._client.nthreads()
        for name, number in threads.items():
            if number > 1:
                raise ConfigError(
                    f"worker {name} would run {number} steps at a time, and each takes all its cores and memory",
                    hint="start it with `dask worker --nthreads 1`",
                )
        return list(threads)

    def _submit(self, title: str, function: Callable[..., Any], given: tuple[Any, ...], worker: str | None) -> Any:
        key = f"{title}-{uuid.uuid4()}"  # never one that the cluster has had: what was made of what, the store knows
        return self._client.submit(function, *given, key=key, pure=False, workers=worker)

    def _ended(self, tasks: Iterable[Any]) -> list[Any]:
        return [task for task in tasks if task.done()]

    def _result(self, task: Any, lost: type[Exception]) -> Any:
        from distributed import CancelledError
        from distributed.scheduler import KilledWorker

        try:
            return task.result(timeout=ANSWER)
        except KilledWorker as error:
            raise lost(task.key.rpartition("-")[0], str(error.last_worker.address)) from error
        except (CancelledError, TimeoutError) as error:
            raise Left from error
