"""What the UNets of several tasks have in common of their weights is stored once.

Convolutions, attention and time embedding are the same in all tasks, in float as in INT8; the feed-forward layers, into
which the routing was folded, and the first convolution differ. See docs/decisions/0021-shared-weights.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from mtu_compile.bundle import EngineRef, TaskEntry
from mtu_compile.core.progress import Progress
from targets.base import LEAST_SHARED, Target


def share_weights(
    target: Target,
    folder: Path,
    entries: Mapping[str, TaskEntry],
    progress: Progress | None = None,
    *,
    least_bytes: int = LEAST_SHARED,
) -> tuple[dict[str, TaskEntry], int | None]:
    """Let the UNets of a bundle keep their weights in one file, if that saves anything worth it.

    Args:
        folder: the bundle in the making, whose engines are all there, and whose manifest is not.
        entries: its tasks; those of one UNet for all tasks stay as they are.
        progress: told that it is done.
        least_bytes: what has to be saved at least.

    Returns:
        The tasks with their engines as they are now, and by how many bytes the bundle is smaller; ``None`` if every
        UNet still has weights of its own.
    """
    engines = _networks(entries)
    if len(engines) < 2:
        return dict(entries), None
    before = _bytes(folder)
    with (progress or Progress()).stage("share weights"):
        shared = target.share_weights(folder, engines, least_bytes=least_bytes)
    if shared == engines:
        return dict(entries), None
    moved = {ref.path: shared[name] for name, ref in engines.items()}
    return {name: _moved(entry, moved) for name, entry in entries.items()}, before - _bytes(folder)


def _networks(entries: Mapping[str, TaskEntry]) -> dict[str, EngineRef]:
    """Every UNet, each once, by a name for its graph: that of its task, the first where they share one."""
    refs: dict[str, tuple[str, EngineRef]] = {}
    for name, entry in sorted(entries.items(), key=_opened_by_others):
        refs.setdefault(entry.engine.path, (name, entry.engine))
        if entry.step_cache is not None:
            refs.setdefault(entry.step_cache.engine.path, (f"{name}-shallow", entry.step_cache.engine))
    return dict(refs.values())


def _moved(entry: TaskEntry, moved: Mapping[str, EngineRef]) -> TaskEntry:
    cache = entry.step_cache
    if cache is not None:
        cache = replace(cache, engine=moved[cache.engine.path])
    return replace(entry, engine=moved[entry.engine.path], step_cache=cache)


def _opened_by_others(item: tuple[str, TaskEntry]) -> bool:
    """A key to sort by: the UNet that pipelines of diffusers' kind open comes first (``layout.unet_folders``)."""
    return PurePosixPath(item[1].engine.path).parts[0] != "unet"


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
