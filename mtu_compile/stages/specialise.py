"""From the exported UNet with its routers to graphs without, edited as the user wants: one a task, or one for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import passes
from mtu_compile import bundle
from mtu_compile.core.errors import PassError
from mtu_compile.core.routing import Routing
from mtu_compile.core.tasks import Task
from mtu_compile.stages.contexts import shared_context, task_context
from mtu_compile.stages.job import SHARED, Model, Specialised
from mtu_compile.steps import NOT_CONTENT, Steps, Work, step

#: What rewrites graphs.
TOOLS = ("onnx", "onnx-ir", "onnx-graphsurgeon", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Edit:
    """A pass of the user's own: by what name it is loaded (``passes.load_pass``), and what it is."""

    name: str = field(metadata=NOT_CONTENT)
    id: str
    sha256: str


@dataclass(frozen=True)
class Rewritten:
    """A graph, and what was done to it."""

    graph: Path
    passes: tuple[bundle.PassRecord, ...]
    user_passes: tuple[bundle.UserPassRecord, ...]


def load_edits(names: Sequence[str]) -> tuple[Edit, ...]:
    """The user's own passes of these names; ``ConfigError`` as ``passes.load_passes``."""
    loaded = passes.load_passes(names)
    return tuple(Edit(_anywhere(name), one.id, one.sha256) for name, one in zip(names, loaded, strict=True))


def _anywhere(name: str) -> str:
    """A pass's name for somebody who may be in another folder."""
    file, colon, attribute = name.rpartition(":")
    return f"{Path(file).resolve()}:{attribute}" if colon and file.endswith(".py") else name


def specialise(
    steps: Steps,
    dynamic: Path,
    model: Model,
    edits: Sequence[Edit] = (),
    *,
    routing: Routing = "static",
) -> dict[str, Specialised]:
    """By task of ``model``, its graph; or under ``SHARED`` the only one. For every target.

    Args:
        dynamic: the UNet with the task as an input.
        model: what it was exported from.
        edits: the user's own passes, run on each graph.
        routing: a graph for each task, or one for all.

    Raises:
        PassError: the routing cannot be specialised, or an edit does not hold; names the node, or the edit.
    """
    ids = {model.task_id(task): task for task in model.tasks}
    if routing == "shared":
        wanted = [Specialised(SHARED, ids, _channels(model, ids), model.most_channels, dynamic, ())]
    else:
        wanted = [
            Specialised(
                task.name, {task_id: task}, _channels(model, {task_id: task}), model.channels(task), dynamic, ()
            )
            for task_id, task in ids.items()
        ]
    calls = [
        rewritten.of(
            f"passes {unet.label}",
            dynamic,
            unet.label,
            passes.SHARED_PIPELINE if unet.shared else passes.TASK_PIPELINE,
            shared_context(model) if unet.shared else task_context(model, next(iter(unet.tasks.values()))),
            tuple(edits),
        )
        for unet in wanted
    ]
    return {
        unet.name: replace(unet, graph=done.graph, passes=done.passes, user_passes=done.user_passes)
        for unet, done in zip(wanted, steps.run_all(calls), strict=True)
    }


@step(tools=TOOLS, cpu=True)
def rewritten(
    work: Work, dynamic: Path, label: str, ids: tuple[str, ...], context: passes.PassContext, edits: tuple[Edit, ...]
) -> Rewritten:
    """The UNet after the passes called ``ids`` and the user's own; ``label``: whose it is, for people."""
    graph, records = work.folder / "model.onnx", list[bundle.UserPassRecord]()
    with work.progress.stage(f"passes {label}"):
        done = passes.run_pipeline(dynamic, graph, ids, context)
    for edit, loaded in zip(edits, passes.load_passes([edit.name for edit in edits]), strict=True):
        if loaded.sha256 != edit.sha256:
            raise PassError(f"{edit.id} is not what it was when the build began", hint="build again")
        with work.progress.stage(f"{edit.id} {label}"):
            edited = graph.with_name(f"edited-{len(records) + 1}.onnx")
            result = passes.run_user_pass(loaded, graph, edited)
        # Graphs are as large as the model: the one before an edit is not needed any more.
        graph.unlink()
        graph.with_name(f"{graph.name}.data").unlink(missing_ok=True)
        graph = edited
        records.append(bundle.UserPassRecord(**asdict(result)))
    return Rewritten(graph, pass_records(done), tuple(records))


def _channels(model: Model, tasks: Mapping[int, Task]) -> dict[str, int]:
    return {task.name: model.channels(task) for task in tasks.values()}


def pass_records(done: Sequence[passes.PassResult]) -> tuple[bundle.PassRecord, ...]:
    """Only what a manifest keeps: a result holds the graph."""
    return tuple(bundle.PassRecord(result.id, result.changed, result.rewrites) for result in done)
