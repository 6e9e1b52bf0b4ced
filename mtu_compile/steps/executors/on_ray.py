"""Steps on a Ray cluster, by its client protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mtu_compile.core.errors import ConfigError, first_line
from mtu_compile.steps.executors.cluster import TRIES, Cluster, Left

#: How often a server of clients is asked that was too busy.
CONNECTS = 3


class OnRay(Cluster):
    """Runs jobs on the nodes of a Ray cluster, on each one at a time: a job takes all CPUs of its node.

    Ray runs a task again whose worker was lost, as often as ``TRIES`` says.
    """

    scheme = "ray"
    _cpus = 0.0
    _left = True

    def _connect(self) -> None:
        import ray

        for left in reversed(range(CONNECTS)):
            try:
                ray.init(str(self), logging_level="ERROR", log_to_driver=False)
                self._left = False
                return
            except (OSError, TimeoutError, RuntimeError) as error:
                ray.shutdown()
                # a server that is there starts a process for each client, which takes too long where it is busy
                if left and isinstance(error, ConnectionAbortedError):
                    continue
                raise ConfigError(
                    f"no Ray cluster answers at {self.address}: {first_line(error)}",
                    hint="`ray start --head` starts one; the port is that of its client server, 10001 by default",
                ) from error

    def close(self) -> None:
        import ray

        if not self._left:
            self._left = True
            ray.shutdown()

    def _workers(self) -> list[str]:
        import ray

        if self._left:
            return []
        cpus = {node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]}
        found = {name: number for name, number in cpus.items() if number}
        self._cpus = min(found.values(), default=0.0)
        return list(found)

    def _submit(self, title: str, function: Callable[..., Any], given: tuple[Any, ...], worker: str | None) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = "DEFAULT" if worker is None else NodeAffinitySchedulingStrategy(worker, soft=False)
        options = {"name": title, "num_cpus": self._cpus, "max_retries": TRIES, "scheduling_strategy": where}
        return ray.remote(function).options(**options).remote(*given)

    def _ended(self, tasks: Iterable[Any]) -> list[Any]:
        import ray

        waited = list(tasks)
        try:
            ended, _ = ray.wait(waited, num_returns=len(waited), timeout=0)
        except ConnectionError:
            return waited
        return list(ended)

    def _result(self, task: Any, lost: type[Exception]) -> Any:
        import ray
        from ray import exceptions

        try:
            return ray.get(task)
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except (exceptions.WorkerCrashedError, exceptions.NodeDiedError, exceptions.OutOfMemoryError) as error:
            raise lost("a step", str(error).splitlines()[0]) from error
        except (exceptions.RayError, ConnectionError) as error:
            raise Left from error
