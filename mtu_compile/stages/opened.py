"""The model in this process: read once, however many steps want it, and let go when nothing does."""

from __future__ import annotations

import gc
from copy import copy, deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mtu_compile.model.sampler import use_sampler
from mtu_compile.stages.job import Checkpoint

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline


def open_pipeline(checkpoint: Checkpoint, sampler: str | None = None) -> MTUPipeline:
    """The float original, with ``sampler`` instead of its own; its networks are everybody's, and stay as they are.

    Raises:
        ConfigError, ModelError: as ``stages.load.load_model``.
    """
    shared = _open(checkpoint.folder, checkpoint.sha256, checkpoint.as_task)
    pipeline = copy(shared)
    pipeline.scheduler = deepcopy(shared.scheduler)
    use_sampler(pipeline, sampler)
    return pipeline


def outline_pipeline(checkpoint: Checkpoint, sampler: str | None = None) -> MTUPipeline:
    """``open_pipeline`` without the weights, which are checked all the same: what a build's driver wants to know.

    Raises:
        ConfigError, ModelError: as ``stages.load.load_model``.
    """
    pipeline = _read(checkpoint.folder, checkpoint.as_task, weights=False)
    use_sampler(pipeline, sampler)
    return pipeline


def let_go() -> None:
    """Nothing wants the float model any more, and quantising wants the memory."""
    _open.cache_clear()
    gc.collect()


@lru_cache(maxsize=1)
def _open(folder: Path, sha256: str, as_task: str | None) -> MTUPipeline:
    """The pipeline in ``folder``; ``sha256``, so that a folder whose content has changed is read again."""
    return _read(folder, as_task, weights=True)


def _read(folder: Path, as_task: str | None, *, weights: bool) -> MTUPipeline:
    from mtu_compile.model.as_task import load_as_task
    from mtu_compile.model.pipeline import MTUPipeline

    # A step's model is one whose content is known: the build that asks for the step has tried its weights.
    if as_task is None:
        return MTUPipeline.from_pretrained(folder, weights=weights, tried=weights, widened=True)
    return load_as_task(folder, as_task, weights=weights, tried=weights)
