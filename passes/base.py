"""What a pass is, what it is told and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

#: A multi-task graph becomes the static graph of one task.
TASK_PIPELINE: tuple[str, ...] = (
    "mtu::bind-task",
    "mtu::fold-routing",
    "mtu::drop-experts",
    "mtu::merge-experts",
    "mtu::freeze-shapes",
    "mtu::plain-attention",
    "mtu::cleanup",
)


@dataclass(frozen=True)
class Alignment:
    """What the inputs of layers are multiplied by, so that every task fills the range of one scale.

    Attributes:
        factors: by name of the layer a positive number for each task.
    """

    factors: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class PassContext:
    """What the passes of one compilation are told. ``None`` leaves a dimension or the task alone.

    Attributes:
        task_id: index of the task the graph is specialised for.
        channels: channels that task reads of ``sample``: those of the noisy latent and of its condition.
        batch: UNet samples a step; ``None``: any number, the dimension called ``batch`` stays free.
        height: rows of the latent.
        width: columns of the latent.
        text_length: tokens of the prompt.
        original: the float ONNX file a quantised graph was made of, for passes that round its weights anew.
        alignment: factors of layers' inputs, for ``mtu::align-ranges``.
    """

    task_id: int | None = None
    channels: int | None = None
    batch: int | None = None
    height: int | None = None
    width: int | None = None
    text_length: int | None = None
    original: Path | None = None
    alignment: Alignment | None = None


@dataclass(frozen=True)
class Skipped:
    """A place a pass looked at and left as it was.

    Attributes:
        node: name of the node (or of the graph input).
        reason: why, in words for a person.
    """

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        id: of the pass.
        graph: the graph after the pass. Passes rewrite in place, so the results of one run share the graph.
        rewrites: places rewritten.
        skipped: places that were looked at and left, with the reason.
    """

    id: str
    graph: ir.Model
    rewrites: int
    skipped: tuple[Skipped, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether the pass rewrote anything."""
        return self.rewrites > 0


class Pass(Protocol):
    """One transformation of a graph.

    ``requires`` and ``ensures`` raise ``PassError`` when the graph must not be given to the pass, or when the pass left
    it in a state it promised not to. A pass that finds nothing to do returns a result without rewrites; a pass that
    finds a thing it cannot rewrite correctly and that must not stay raises ``PassError`` with the node's name.
    """

    @property
    def id(self) -> str:
        """``mtu::<name>``."""

    @property
    def after(self) -> tuple[str, ...]:
        """Ids of passes that come earlier in every pipeline that has both."""

    def requires(self, graph: ir.Model, context: PassContext) -> None:
        """Raise ``PassError`` if ``graph`` or ``context`` is not what the pass works on."""

    def run(self, graph: ir.Model, context: PassContext) -> PassResult:
        """Rewrite ``graph`` in place."""

    def ensures(self, graph: ir.Model, context: PassContext) -> None:
        """Raise ``PassError`` if the rewritten graph breaks the pass's promise."""
