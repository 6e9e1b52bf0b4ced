"""Where each task's training data comes from: encoded once if it fits, at every step if not, or streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtu_compile.core.errors import InputError
from mtu_compile.core.progress import Progress
from mtu_compile.core.rows import Row
from mtu_compile.core.tasks import Task
from mtu_compile.model import data
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.row_notes import note_rows
from mtu_compile.model.train_config import TrainConfig


def make_encoder(config: TrainConfig, pipeline: MTUPipeline) -> data.Encoder:
    height, width = pipeline.default_size
    return data.Encoder(
        vae=pipeline.vae,
        texts=pipeline.texts,
        height=height,
        width=width,
        mask_variants=config.mask_variants,
        seed=config.seed,
        fit=config.fit,
    )


def open_sources(
    config: TrainConfig,
    accelerator: Any,
    pipeline: MTUPipeline,
    tasks: tuple[tuple[int, Task], ...],
    model: str,
    progress: Progress,
) -> dict[str, data.Source]:
    encoder = make_encoder(config, pipeline)
    for _, task in tasks:
        if not (config.data / task.name).is_dir():
            raise InputError(
                f"{config.data} has no folder {task.name!r}", hint="add it, or choose the tasks to train with --task"
            )
    if config.streaming:
        return {
            task.name: data.StreamedSource(task, config.data / task.name, encoder, _task_seed(config, task))
            for _, task in tasks
        }
    rows = {task.name: data.training_rows(config.data / task.name, task) for _, task in tasks}
    if accelerator.is_main_process:
        latent = encoder.height // pipeline.vae_scale, encoder.width // pipeline.vae_scale
        for _, task in tasks:
            note_rows(task, rows[task.name], encoder, latent, progress)
    needed = sum(_encoded_bytes(task, rows[task.name], encoder, pipeline) for _, task in tasks)
    if needed > config.cache_gb * 1e9:
        return {
            task.name: data.DirectSource(task, rows[task.name], encoder, _task_seed(config, task)) for _, task in tasks
        }
    sources: dict[str, data.Source] = {}
    for _, task in tasks:
        cache = config.work_folder / "cache" / data.cache_key(task, rows[task.name], encoder, model)
        cache = cache.with_suffix(".safetensors")
        with accelerator.main_process_first():
            tensors = data.load_cache(cache)
            if tensors is None:
                total = data.encoded_pictures(task, rows[task.name], encoder)
                with progress.stage(f"encode {task.name}", total) as advance:
                    tensors = data.encode_set(task, rows[task.name], encoder, advance)
                data.save_cache(cache, tensors)
        sources[task.name] = data.CachedSource(tensors, _task_seed(config, task))
    return sources


def _encoded_bytes(task: Task, rows: Sequence[Row], encoder: data.Encoder, pipeline: MTUPipeline) -> int:
    channels = int(pipeline.unet.latent_channels)
    latent = 4 * (encoder.height // pipeline.vae_scale) * (encoder.width // pipeline.vae_scale)
    targets = len({row.target for row in rows})
    conditions = data.encoded_pictures(task, rows, encoder) - targets
    texts = encoder.texts
    prompts = len({row.prompt for row in rows}) * (texts.length * texts.width + texts.pooled_width) * 4
    return latent * (targets * channels + conditions * task.condition_channels(channels)) + prompts


def _task_seed(config: TrainConfig, task: Task) -> int:
    # A task's data order does not depend on which other tasks are trained with it.
    return int(np.random.SeedSequence([config.seed, *task.name.encode()]).generate_state(1)[0])
