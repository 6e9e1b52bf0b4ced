"""Run passes one after the other, checking the graph after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from mtu_compile.graph import io as graph_io
from passes.base import Pass, PassContext, PassResult
from passes.registry import TASK_PIPELINE, Registry, builtin

OnPass = Callable[[PassResult], None]


def run_passes(
    graph: ir.Model, passes: Sequence[Pass], context: PassContext, *, on_pass: OnPass | None = None
) -> tuple[PassResult, ...]:
    """Rewrite ``graph`` in place by ``passes``; after each, its promise and the ONNX checker are tried.

    Raises:
        PassError: a pass refused the graph, or left one that is not valid ONNX.
    """
    results = []
    for item in passes:
        item.requires(graph, context)
        result = item.run(graph, context)
        graph_io.check(result.graph, result.id)
        item.ensures(result.graph, context)
        results.append(result)
        if on_pass is not None:
            on_pass(result)
        graph = result.graph
    return tuple(results)


def run_pipeline(
    model_path: Path,
    out: Path,
    ids: Sequence[str],
    context: PassContext,
    *,
    registry: Registry | None = None,
    external_bytes: int = graph_io.EXTERNAL_BYTES,
    reuse: bool = False,
    on_pass: OnPass | None = None,
) -> tuple[PassResult, ...]:
    """Run the passes called ``ids`` on an ONNX file and write the result to the file ``out``.

    Weights above ``external_bytes`` go to ``<out>.data``. Only the weights a pass rewrites are read into memory, one at
    a time. On an error nothing is written. ``reuse``: see ``graph.io.save``.

    Raises:
        ConfigError: a pipeline that does not hold together.
        ModelError: ``model_path`` cannot be read.
        PassError: a pass refused the graph.
    """
    passes = (registry or builtin()).pipeline(ids)
    results = run_passes(graph_io.load(model_path), passes, context, on_pass=on_pass)
    if results:
        graph_io.save(results[-1].graph, out, external_bytes=external_bytes, reuse=reuse)
    return results


def specialise(
    model_path: Path,
    out: Path,
    *,
    task_id: int,
    channels: int,
    batch: int,
    height: int,
    width: int,
    text_length: int,
    external_bytes: int = graph_io.EXTERNAL_BYTES,
    on_pass: OnPass | None = None,
) -> tuple[PassResult, ...]:
    """Turn the exported multi-task UNet into the static graph of one task, from file to file.

    Args:
        model_path: what ``mtu_compile.model.export.export_unet`` wrote.
        out: ONNX file to write.
        task_id: index of the task in the model's ``tasks``.
        channels: channels of the noisy latent and of the task's condition.
        batch: UNet samples a step.
        height: rows of the latent.
        width: columns of the latent.
        text_length: tokens of a prompt.
        external_bytes: weights above this go to ``<out>.data``.
        on_pass: called after each pass.

    Returns:
        What each pass did.

    Raises:
        ModelError: ``model_path`` cannot be read.
        PassError: the graph cannot be specialised; the message names the node.
    """
    context = PassContext(task_id, channels, batch, height, width, text_length)
    return run_pipeline(model_path, out, TASK_PIPELINE, context, external_bytes=external_bytes, on_pass=on_pass)
