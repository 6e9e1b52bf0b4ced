"""One task of a bundle in the layout of diffusers' exports, for tools that know neither ``task`` nor shared weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mtu_compile import bundle
from mtu_compile.core.atomic import staging
from mtu_compile.core.errors import ConfigError
from mtu_compile.core.families import FAMILIES
from mtu_compile.core.progress import Progress
from mtu_compile.stages.layout import model_index, pipeline_class

__all__ = ["StaticExport", "export_static"]

INDEX = "model_index.json"


@dataclass(frozen=True)
class StaticExport:
    """What was written.

    Attributes:
        path: the folder.
        unet: the task's graph in it.
        pipeline: class of diffusers' pipelines that opens the folder; ``None`` where none has such a task.
    """

    path: Path
    unet: Path
    pipeline: str | None


def export_static(path: Path, task: str, out: Path, progress: Progress | None = None) -> StaticExport:
    """Write one task of the bundle at ``path`` to the folder ``out``: what a static bundle of it alone would have.

    The graph is the bundle's own, its task fixed where it serves all tasks and its weights beside it, so a step takes
    what it takes there; nothing is quantised, compiled or checked anew.

    Raises:
        BundleError: the bundle is damaged.
        ConfigError: a task it does not have, one that has graph and weights of its own already, or ``out`` exists.
        ModelError, BuildError: its graph cannot be read.
    """
    progress = progress or Progress()
    with progress.stage("verify"):
        manifest = bundle.read(path, verify=True)
    if task not in manifest.tasks:
        raise ConfigError(f"unknown task {task!r}", hint=f"the bundle has {', '.join(manifest.tasks)}")
    entry = manifest.tasks[task]
    if manifest.routing != "shared" and entry.engine.weights is None:
        raise ConfigError(
            "every task of this bundle has a graph of its own already",
            hint=f"that of {task} is {entry.engine.path}; see docs/interop.md",
        )
    family = FAMILIES[manifest.family]
    name = pipeline_class(entry.task, family)
    with staging(out, replace=False) as folder, progress.stage(f"export {task}"):
        _copy_parts(path, manifest, folder)
        channels = manifest.latent_channels + entry.task.condition_channels(manifest.latent_channels)
        graph = bundle.resolve(path, entry.engine.path)
        if entry.engine.weights is None:
            unet = _bind(graph, folder / "unet", entry, channels)
        else:
            unet = _unshare(graph, bundle.resolve(path, entry.engine.weights), folder / "unet")
        config = PurePosixPath(entry.engine.path).with_name("config.json").as_posix()
        if config in manifest.files:  # a bundle for devices of a vendor whose tools open such folders
            known = json.loads(bundle.resolve(path, config).read_text(encoding="utf-8"))
            _write_json(folder / "unet" / "config.json", {**known, "in_channels": channels})
            if name is not None:
                scheduler, zeros = str(manifest.scheduler["_class_name"]), manifest.zeros_for_empty_prompt
                _write_json(folder / INDEX, model_index(name, family, scheduler, zeros_for_empty=zeros))
        relative = unet.relative_to(folder)
    return StaticExport(out, out / relative, name)


def _copy_parts(path: Path, manifest: bundle.Manifest, folder: Path) -> None:
    """Text encoders, tokenizers, autoencoder and scheduler."""
    texts = (place for text in manifest.texts.values() for place in (text.engine.path, text.tokenizer))
    places = [*texts, manifest.vae_decoder.path, "scheduler/"]
    places += [] if manifest.vae_encoder is None else [manifest.vae_encoder.path]
    folders = {PurePosixPath(place).parts[0] for place in places}
    for name in manifest.files:
        if PurePosixPath(name).parts[0] in folders:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(bundle.resolve(path, name), folder / name)


def _bind(graph: Path, folder: Path, entry: bundle.TaskEntry, channels: int) -> Path:
    """The graph with its task fixed, in the new ``folder``."""
    folder.mkdir()
    if graph.suffix == ".onnx":
        from mtu_compile.graph.one_task import bind_onnx

        bind_onnx(graph, folder / "model.onnx", task_id=entry.task_id, channels=channels)
        return folder / "model.onnx"
    from targets.openvino.one_task import bind_ir

    return bind_ir(graph, folder, task_id=entry.task_id, channels=channels, batch=entry.task.unet_batch)


def _unshare(graph: Path, weights: Path, folder: Path) -> Path:
    """The graph with its weights beside it, in the new ``folder``."""
    folder.mkdir()
    if graph.suffix == ".onnx":
        from mtu_compile.graph import io as graph_io

        return graph_io.save(graph_io.load(graph), folder / "model.onnx")
    from targets.openvino.shared_ir import own_constants

    return own_constants(graph, weights, folder / graph.name)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
