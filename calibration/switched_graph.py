"""A graph in which every quantised layer can be switched between float and INT8, opened and run.

Measuring what a choice of layers costs in accuracy takes a run with just these in INT8. Hundreds of such graphs would
have to be written and opened; here there is one (``calibration.joined_graph``), which ONNX Runtime runs. What each
layer's INT8 does to the output is known without a run for each, from derivatives (``calibration.first_order``), which
torch has.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibration.first_order import HELD_BYTES, first_order_errors
from calibration.joined_graph import SWITCHES, join
from calibration.torch_graph import Step, TorchGraph
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.sessions import open_as_written

Array = NDArray[Any]
Feed = Mapping[str, Array]
T = TypeVar("T")


class SwitchedGraph:
    """The graph, opened. A context manager: it lies beside the float graph, whose weights it shares, for a while.

    Attributes:
        groups: what is switched, in graph order.
        derivable: whether ``errors`` can be had: derivatives are known of every operation.
    """

    def __init__(
        self, float_graph: Path, int8_graph: Path, *, parallel: bool = False, held_bytes: int = HELD_BYTES
    ) -> None:
        """Join the two graphs.

        Args:
            float_graph: static, float32.
            int8_graph: its quantised twin, with the same node names (``quantize_onnx``, perhaps legalised).
            parallel: run as many inferences at a time as there are cores, each on one. A small network gains by that; a
                large one keeps all cores busy by itself, and needs its memory but once.
            held_bytes: activations that are held for derivatives.

        Raises:
            ModelError: one of them is unreadable.
            PassError: they do not belong together, or nothing is quantised.
        """
        model, self.groups = join(float_graph, int8_graph)
        self._output = str(model.graph.outputs[0].name)
        self.derivable = all(Step.of(node).differentiable for node in model.graph)
        self._held = held_bytes
        self._workers = _cores() if parallel else 1
        self._opened: Any = None
        with ExitStack() as stack:
            path = stack.enter_context(graph_io.beside(float_graph, "joined"))
            self._path = graph_io.save(model, path, reuse=True)
            del model
            self._opened = self._session
            self._scratch = stack.pop_all()

    def __enter__(self) -> SwitchedGraph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened = None
        self._scratch.close()

    @property
    def _session(self) -> Any:
        """The graph in ONNX Runtime."""
        if self._opened is None:
            gc.collect()  # what torch ran: nodes and values refer to each other, and hold the files of the weights
            # Optimisations would fuse what has to stay apart, and compute constants of branches that never run. Threads
            # that have nothing to do would go on waiting for work, and take it from torch's.
            threads = 1 if self._workers > 1 else 0
            entries = {"session.force_spinning_stop": "1"}
            self._opened = open_as_written(self._path, threads=threads, entries=entries)
        return self._opened

    def run(self, feed: Feed, int8: Collection[str] = ()) -> Array:
        """The graph's first output with the groups named in ``int8`` quantised and all others in float32."""
        output: Array = self._session.run([self._output], dict(self._switched(feed, int8)))[0]
        return output

    def run_all(self, feeds: Iterable[Feed], int8: Collection[str] = ()) -> Iterator[Array]:
        """What ``run`` returns for each of ``feeds``, in their order."""
        yield from self._map(lambda feed: self.run(feed, int8), feeds)

    def run_each(self, feed: Feed, numbers: Iterable[int]) -> Iterator[Array]:
        """What ``run`` returns with each of the groups of these ``numbers`` quantised alone, in their order."""
        yield from self._map(lambda number: self.run(feed, (self.groups[number].name,)), numbers)

    def errors(self, feeds: Iterable[Feed], probes: int) -> Iterator[Array]:
        """For each of ``feeds`` what ``first_order_errors`` finds of the groups, in their order.

        Only where ``derivable``.
        """
        if self._workers == 1:  # of a large network, one runtime at a time has the weights in memory
            self._opened = None
        graph = TorchGraph(graph_io.load(self._path))
        members = [group.members for group in self.groups]

        def of(feed: Feed) -> Array:
            off = self._switched(feed, ())
            return first_order_errors(graph, members, off, probes, held_bytes=self._held)

        yield from self._map(of, feeds)

    def _switched(self, feed: Feed, int8: Collection[str]) -> Feed:
        return {**feed, SWITCHES: np.array([group.name in int8 for group in self.groups])}

    def _map(self, function: Callable[[T], Array], over: Iterable[T]) -> Iterator[Array]:
        if self._workers == 1:
            yield from map(function, over)
            return
        with _one_thread_each(), ThreadPoolExecutor(self._workers) as pool:
            yield from pool.map(function, over)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch use one thread for what each of ours computes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
