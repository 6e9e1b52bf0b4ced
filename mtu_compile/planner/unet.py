"""The UNet of a model in both forms of routing, as shapes: its export after the passes, with nothing written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import passes
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.edit import TASK_IDS, find_input
from passes import PassContext

if TYPE_CHECKING:
    import onnx_ir as ir


class Unet:
    """An exported UNet, and the tasks it is planned for.

    Graphs are rewritten in memory, half a second each for the example. Weights are computed when a graph is written, so
    never here.
    """

    def __init__(self, dynamic: Path, contexts: Mapping[str, PassContext]) -> None:
        """
        Args:
            dynamic: ONNX file of the UNet with the task as an input (or a plain UNet, with one task).
            contexts: by task, what the passes of its static graph are told; sizes and batch are those of the build.
        """
        self._dynamic = dynamic
        self._contexts = dict(contexts)
        self._static: dict[str, ir.Model] = {}
        self._shared: dict[int, ir.Model] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self._contexts)

    @property
    def latent(self) -> tuple[int, int]:
        """Rows and columns of the latent."""
        first = next(iter(self._contexts.values()))
        assert first.height is not None and first.width is not None
        return first.height, first.width

    def batch(self, tasks: Sequence[str]) -> int:
        """The most samples a step of one of ``tasks`` has."""
        return max(self._contexts[task].batch or 1 for task in tasks)

    @cached_property
    def routed(self) -> bool:
        """Whether the task is an input, so that one engine can serve several."""
        return find_input(graph_io.load(self._dynamic), TASK_IDS) is not None

    def static(self, task: str) -> ir.Model:
        """The graph of one task.

        Raises:
            PassError: the routing cannot be specialised; names the node.
        """
        if task not in self._static:
            self._static[task] = self._pass(passes.TASK_PIPELINE, self._contexts[task])
        return self._static[task]

    def shared(self, batch: int) -> ir.Model:
        """The graph of all tasks, with ``batch`` samples a step; raises as ``static``."""
        if batch not in self._shared:
            context = replace(next(iter(self._contexts.values())), task_id=None, channels=None, batch=batch)
            self._shared[batch] = self._pass(passes.SHARED_PIPELINE, context)
        return self._shared[batch]

    def resized(self, latent: tuple[int, int]) -> ir.Model:
        """The export as it is with one sample and latents of another size; only its shapes mean something."""
        context = replace(next(iter(self._contexts.values())), batch=1, height=latent[0], width=latent[1])
        return self._pass(("mtu::freeze-shapes",), context)

    def _pass(self, ids: Sequence[str], context: PassContext) -> ir.Model:
        graph = graph_io.load(self._dynamic)
        for one in passes.builtin().pipeline(ids):
            one.requires(graph, context)
            graph = one.run(graph, context).graph
            one.ensures(graph, context)
        return graph
