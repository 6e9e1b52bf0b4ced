"""A graph in which every quantised layer can be switched between float and INT8, opened and run.

Measuring what a layer costs in accuracy takes one run with only that layer in INT8. Hundreds of such graphs would have
to be written and opened; here there is one (``calibration.joined_graph``), cut into segments, so that what comes before
a layer is run but once.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibration.joined_graph import SWITCHES, TWIN, join
from calibration.layer_groups import LayerGroup
from calibration.segments import Segment, cut
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.sessions import open_as_written

if TYPE_CHECKING:
    import onnx_ir as ir

Array = NDArray[Any]
Feed = Mapping[str, Array]
T = TypeVar("T")

#: How many segments the graph is cut into: more would save little, a run begins in the middle on average.
SEGMENTS = 8


class SwitchedGraph:
    """The graph, opened in ONNX Runtime. A context manager: the graph lies in a temporary folder."""

    def __init__(
        self, float_graph: Path, int8_graph: Path, *, folder: Path | None = None, parallel: bool = False
    ) -> None:
        """Join the two graphs.

        Args:
            float_graph: static, float32.
            int8_graph: its quantised twin, with the same node names (``quantize_onnx``, perhaps legalised).
            folder: for the temporary files; the system's own otherwise.
            parallel: run as many inferences at a time as there are cores, each on one (see ``run_all``). A small
                network gains by that; a large one keeps all cores busy by itself, and needs its memory but once.

        Raises:
            ModelError: one of them is unreadable.
            PassError: they do not belong together, or nothing is quantised.
        """
        model, self.groups = join(float_graph, int8_graph)
        starts = _starts(model, self.groups)
        segments = cut(model, [start for i, start in enumerate(starts) if start not in starts[:i]])
        places = {node.name: i for i, segment in enumerate(segments) for node in segment.model.graph}
        self._first = [places[start.name] for start in starts]
        self._output = str(model.graph.outputs[0].name)
        self._workers = _cores() if parallel else 1
        self._scratch = tempfile.TemporaryDirectory(dir=folder, prefix="mtu-switches-")
        try:
            self._segments = [
                _Opened(segment, Path(self._scratch.name) / f"{i}.onnx", threads=1 if self._workers > 1 else 0)
                for i, segment in enumerate(segments)
            ]
        except BaseException:
            self._scratch.cleanup()
            raise

    def __enter__(self) -> SwitchedGraph:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._segments
        self._scratch.cleanup()

    def run(self, feed: Feed, int8: Collection[str] = ()) -> Array:
        """The graph's first output with the groups named in ``int8`` quantised and all others in float32."""
        return self._run(feed, int8, self._segments)

    def run_all(self, feeds: Iterable[Feed], int8: Collection[str] = ()) -> Iterator[Array]:
        """What ``run`` returns for each of ``feeds``, in their order."""
        yield from self._map(lambda feed: self.run(feed, int8), feeds)

    def run_each(self, feed: Feed) -> Iterator[Array]:
        """What ``run`` returns with each of the groups quantised alone, in their order.

        Faster than as many runs, because what comes before a group's segment is run only once.
        """
        before: list[Feed] = [feed]
        for segment in self._segments[:-1]:
            before.append({**before[-1], **segment.run({**before[-1], SWITCHES: self._switches(())})})

        def alone(index: int) -> Array:
            first = self._first[index]
            return self._run(before[first], (self.groups[index].name,), self._segments[first:])

        yield from self._map(alone, range(len(self.groups)))

    def _run(self, feed: Feed, int8: Collection[str], segments: Sequence[_Opened]) -> Array:
        values = {**feed, SWITCHES: self._switches(int8)}
        for segment in segments:
            values |= segment.run(values)
        return values[self._output]

    def _switches(self, int8: Collection[str]) -> Array:
        return np.array([group.name in int8 for group in self.groups])

    def _map(self, function: Callable[[T], Array], over: Iterable[T]) -> Iterator[Array]:
        if self._workers == 1:
            yield from map(function, over)
            return
        with ThreadPoolExecutor(self._workers) as pool:
            yield from pool.map(function, over)


class _Opened:
    """A segment of the graph in ONNX Runtime."""

    def __init__(self, segment: Segment, path: Path, *, threads: int) -> None:
        self._segment = segment
        graph_io.save(segment.model, path)
        # Optimisations would fuse what has to stay apart, and compute constants of branches that never run.
        # Threads of a segment that is done would go on waiting for work, and take it from the next one's.
        self._session = open_as_written(path, threads=threads, entries={"session.force_spinning_stop": "1"})

    def run(self, values: Feed) -> dict[str, Array]:
        """What the segment makes of ``values``, by name; those it does not read are left alone."""
        outputs = self._segment.outputs
        arrays = self._session.run(list(outputs), {name: values[name] for name in self._segment.inputs})
        return dict(zip(outputs, arrays, strict=True))


def _starts(model: ir.Model, groups: Sequence[LayerGroup]) -> list[ir.Node]:
    """For each group the node, one of ``SEGMENTS``, that a run may begin with if only this group differs."""
    place = {name: i for i, group in enumerate(groups) for name in group.members}
    switches = {f"{TWIN}{name}/switch": i for name, i in place.items()}
    first: dict[int, ir.Node] = {}
    for node in model.graph:
        if node.name in switches:
            first.setdefault(switches[node.name], node)
    # Groups are in the order of their first members.
    every = -(-len(groups) // SEGMENTS)
    return [first[i - i % every] for i in range(len(groups))]


def _cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
