"""Train experts, routers, task norms and input convolutions on all tasks at once; the pretrained rest is frozen.

The paper's recipe (Chavhan et al., ICML 2025, section 4.1): the sum over tasks of the prediction error, one UNet call
for all tasks. Everything random in a step is drawn from (seed, step, process), so a resumed run needs no generator
state to see the same data, noise and timesteps again.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mtu_compile.core.atomic import staging
from mtu_compile.core.errors import ConfigError, ModelError
from mtu_compile.core.families import TEXT_EMBEDS, TIME_IDS
from mtu_compile.core.hashing import model_sha256
from mtu_compile.core.progress import Progress
from mtu_compile.core.sizes import Sizes
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.model import checkpoint as checkpoints
from mtu_compile.model import data
from mtu_compile.model.folder import INDEX, check_destination
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.recipe import (
    drop_conditions,
    learning_rate,
    loss_weights,
    make_optimizer,
    require_trainable,
    trained_parameters,
)
from mtu_compile.model.sources import make_encoder, open_sources
from mtu_compile.model.text import Encoded
from mtu_compile.model.train_config import FREE, StepReport, TrainConfig, TrainResult
from mtu_compile.model.train_report import training_report
from mtu_compile.model.unet import call_unet


@dataclass
class _Run:
    """The moving parts of a run."""

    config: TrainConfig
    accelerator: Any
    pipeline: MTUPipeline
    tasks: tuple[tuple[int, Task], ...]
    trained: dict[str, nn.Parameter]
    model: Any
    optimizer: torch.optim.Optimizer
    ema: EMAModel
    noise: DDPMScheduler
    weights: Tensor  # [timesteps], of the loss
    empty: Encoded  # [1, …], what takes the prompt's place in guidance
    sources: dict[str, data.Source] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0  # of earlier runs
    history: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def train(
    config: TrainConfig,
    *,
    on_step: Callable[[StepReport], None] = lambda report: None,
    progress: Progress | None = None,
) -> TrainResult:
    """Train and write ``config.output``.

    Args:
        config: the run.
        on_step: called after every step, in the main process.
        progress: watches the data being encoded.

    Raises:
        ConfigError: settings that contradict each other, the model or an earlier run's.
        InputError: training data that is missing or bad, naming file and line.
        ModelError: a model folder or a checkpoint that is missing or damaged, naming the file.
    """
    run = _prepare(config, progress or Progress())
    began = time.monotonic()
    last = min(config.steps, config.stop_at or config.steps)
    log = _open_log(run)
    losses: dict[str, float] = {}
    try:
        while run.step < last:
            report = _step(run)
            losses = dict(report.losses)
            run.history.append({"step": report.step, "loss": report.loss, **losses})
            _write_log(log, report)
            if run.accelerator.is_main_process:
                on_step(report)
            spent = time.monotonic() - began
            if config.max_hours is not None and _agreed(run, spent) > config.max_hours * 3600:
                last = run.step
            if run.step % config.save_every == 0 or run.step == last:
                _save_checkpoint(run, run.seconds + spent)
    finally:
        if log is not None:
            log.close()
    run.seconds += time.monotonic() - began
    _write_output(run)
    return TrainResult(config.output, run.step, run.step >= config.steps, losses, run.seconds / 3600)


def _agreed(run: _Run, seconds: float) -> float:
    """The mean over all processes: they have to stop at the same step."""
    return float(run.accelerator.reduce(torch.tensor(seconds, device=run.accelerator.device), "mean"))


def export(config: TrainConfig) -> TrainResult:
    """Write ``config.output`` from the last checkpoint in the work folder, without training (a run may be going on)."""
    found = checkpoints.found(config.work_folder / "checkpoints")
    if not found:
        raise ConfigError(f"there is no checkpoint in {config.work_folder}", hint="train first")
    check_destination(config.output, force=config.force)
    saved = checkpoints.load(found[-1])
    pipeline = MTUPipeline.from_pretrained(config.model)
    _copy_weights(trained_parameters(pipeline.unet), saved.ema, found[-1])
    record = saved.record
    _save_pipeline(config, pipeline, training_report(config, saved.step, record["seconds"], record["history"], record))
    return TrainResult(config.output, saved.step, saved.step >= config.steps, {}, record["seconds"] / 3600)


def _prepare(config: TrainConfig, progress: Progress) -> _Run:
    folder = config.work_folder / "checkpoints"
    found = checkpoints.found(folder)
    if found and not config.resume and not config.force:
        raise ConfigError(
            f"{config.work_folder} holds {len(found)} checkpoints of an earlier run",
            hint="add --resume to go on, or --force to start over",
        )
    check_destination(config.output, force=config.force or config.resume)
    saved = checkpoints.load(found[-1]) if found and config.resume else None
    if saved is not None:
        _check_same_run(config, saved)

    # Accelerate keeps its state for the life of the process; another run may want another precision.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.cpu)
    pipeline = MTUPipeline.from_pretrained(config.model)
    tasks = tuple(find_task(pipeline.unet.tasks, name) for name in config.tasks) or tuple(
        enumerate(pipeline.unet.tasks)
    )
    for part in (pipeline.unet, pipeline.vae, *pipeline.texts.encoders):
        part.requires_grad_(False)
        part.to(accelerator.device)
    require_trainable(pipeline.unet)
    trained = trained_parameters(pipeline.unet)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    pipeline.unet.train()
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    if saved is not None:
        _copy_weights(trained, saved.weights, found[-1])
    noise = DDPMScheduler.from_config(pipeline.scheduler.config)
    provenance = {"model_sha256": model_sha256(config.model)}
    sources = open_sources(config, accelerator, pipeline, tasks, provenance["model_sha256"], progress)

    optimizer = make_optimizer(config, trained)
    ema = EMAModel(trained.values(), decay=config.ema, foreach=True)
    run = _Run(
        config=config,
        accelerator=accelerator,
        pipeline=pipeline,
        tasks=tasks,
        trained=trained,
        model=accelerator.prepare(pipeline.unet),
        optimizer=accelerator.prepare(optimizer),
        ema=ema,
        noise=noise,
        weights=loss_weights(noise, config.min_snr).to(accelerator.device),
        empty=make_encoder(config, pipeline).no_prompt(),
        sources=sources,
        provenance=provenance,
    )
    if saved is not None:
        checkpoints.restore_optimizer(optimizer, saved.optimizer, trained)
        _restore_ema(run, saved, found[-1])
        run.step, run.seconds, run.history = saved.step, saved.record["seconds"], list(saved.record["history"])
    elif accelerator.is_main_process:
        for old in found:
            shutil.rmtree(old)
        shutil.rmtree(config.work_folder / "log", ignore_errors=True)
    accelerator.wait_for_everyone()
    return run


def _check_same_run(config: TrainConfig, saved: checkpoints.Checkpoint) -> None:
    before, now = saved.record["config"], json.loads(json.dumps(config.to_json()))
    # a setting that there was not when the run began is none it could have had otherwise
    for name in (f.name for f in fields(config) if f.name not in FREE and f.name in before):
        if before[name] != now[name]:
            raise ConfigError(
                f"the run to resume had {name} = {before[name]!r}, this one has {now[name]!r}",
                hint="give the same settings, or another --work folder",
            )
    if saved.record["model_sha256"] != model_sha256(config.model):
        raise ConfigError(
            f"the run to resume started from another model than {config.model}",
            hint="give the model it started from, or another --work folder",
        )


def _copy_weights(trained: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], place: Path) -> None:
    if trained.keys() != saved.keys():
        raise ModelError(f"checkpoint {place} is of another model", hint="give the model the run started from")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def _restore_ema(run: _Run, saved: checkpoints.Checkpoint, place: Path) -> None:
    if run.trained.keys() != saved.ema.keys():
        raise ModelError(f"checkpoint {place} is of another model", hint="give the model the run started from")
    run.ema.shadow_params = [saved.ema[name].to(p.device) for name, p in run.trained.items()]
    run.ema.optimization_step = saved.step


def _step(run: _Run) -> StepReport:
    """One optimizer step over all tasks."""
    began = time.monotonic()
    config, accelerator = run.config, run.accelerator
    rate = learning_rate(config, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    per_task = torch.zeros(len(run.tasks), device=accelerator.device)
    for micro in range(config.accumulate):
        batch = _batch(run, micro)
        last = micro + 1 == config.accumulate
        with nullcontext() if last else accelerator.no_sync(run.model):
            losses = _losses(run, batch)
            accelerator.backward(losses.sum() / config.accumulate)
        per_task += losses.detach() / config.accumulate
    norm = accelerator.clip_grad_norm_(list(run.trained.values()), config.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.step(run.trained.values())
    run.step += 1
    values = accelerator.reduce(per_task, "mean").tolist()
    if not all(map(math.isfinite, values)):
        raise ModelError(
            f"the loss is not finite at step {run.step}", hint="lower --learning-rate and resume the last checkpoint"
        )
    return StepReport(
        step=run.step,
        steps=config.steps,
        loss=sum(values),
        losses={task.name: value for (_, task), value in zip(run.tasks, values, strict=True)},
        learning_rate=rate,
        gradient_norm=float(norm),
        seconds=time.monotonic() - began,
    )


@dataclass(frozen=True)
class _Batch:
    """All tasks' examples of one UNet call, task after task."""

    latents: Tensor  # [B, C, h, w]
    condition: Tensor  # [B, c_max, h, w]
    text: Tensor  # [B, L, D]
    pooled: Tensor  # [B, P], P may be 0
    noise: Tensor  # [B, C, h, w]
    timesteps: Tensor  # [B]
    task_ids: Tensor  # [B]


def _batch(run: _Run, micro: int) -> _Batch:
    config, rank, processes = run.config, run.accelerator.process_index, run.accelerator.num_processes
    size = config.batch_size
    # Position of this process's slice in every task's endless sequence.
    position = ((run.step * config.accumulate + micro) * processes + rank) * size
    channels = run.pipeline.unet.sample_channels - run.pipeline.unet.latent_channels
    parts = []
    for task_id, task in run.tasks:
        # By the task's name, not its number: a network of this task alone sees the same examples, noise and timesteps.
        draws = [config.seed, run.step, micro, rank, int.from_bytes(task.name.encode(), "big")]
        batch = run.sources[task.name].take(position, size, np.random.default_rng([*draws, 0]))
        rng = np.random.default_rng([*draws, 1])
        batch = drop_conditions(task, batch, run.empty, rng)
        # Stratified over the schedule: every batch sees all noise levels, so the loss is less noisy.
        total = run.noise.config.num_train_timesteps
        timesteps = np.floor((rng.permutation(size) + rng.random(size)) / size * total).astype(np.int64)
        noise = rng.standard_normal(tuple(batch.latents.shape), dtype=np.float32)
        padded = nn.functional.pad(batch.condition, (0, 0, 0, 0, 0, channels - batch.condition.shape[1]))
        ids = torch.full((size,), task_id)
        noises, times = torch.from_numpy(noise), torch.from_numpy(timesteps)
        parts.append((batch.latents, padded, batch.text, batch.pooled, noises, times, ids))
    # Dropout inside the UNet, where a configuration has any, draws from torch's own generator.
    seeds = np.random.SeedSequence([config.seed, run.step, micro, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(seeds[0] >> 1))
    device = run.accelerator.device
    return _Batch(*(torch.cat(column).to(device) for column in zip(*parts, strict=True)))


def _losses(run: _Run, batch: _Batch) -> Tensor:
    """Weighted mean squared error of each task, [tasks]."""
    noisy = run.noise.add_noise(batch.latents, batch.noise, batch.timesteps)
    if run.noise.config.prediction_type == "v_prediction":
        target = run.noise.get_velocity(batch.latents, batch.noise, batch.timesteps)
    else:
        target = batch.noise
    sample = torch.cat([noisy, batch.condition], dim=1)
    inputs = {"sample": sample, "timestep": batch.timesteps, "encoder_hidden_states": batch.text}
    if run.pipeline.family.conditions:
        # Pictures are fitted to the size that is trained at: nothing of them was enlarged or is to look cut off.
        ids = torch.from_numpy(Sizes().time_ids(run.pipeline.default_size)).to(sample.device)
        inputs |= {TEXT_EMBEDS: batch.pooled, TIME_IDS: ids.expand(len(sample), -1)}
    predicted = call_unet(run.model, inputs, task_ids=batch.task_ids)
    errors = (predicted.float() - target).pow(2).mean(dim=(1, 2, 3)) * run.weights[batch.timesteps]
    return errors.unflatten(0, (len(run.tasks), -1)).mean(dim=1)


def _open_log(run: _Run) -> Any:
    if not run.accelerator.is_main_process:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run.config.work_folder / "log", purge_step=run.step + 1)


def _write_log(log: Any, report: StepReport) -> None:
    if log is None:
        return
    log.add_scalar("loss/total", report.loss, report.step)
    for task, loss in report.losses.items():
        log.add_scalar(f"loss/{task}", loss, report.step)
    log.add_scalar("learning_rate", report.learning_rate, report.step)
    log.add_scalar("gradient_norm", report.gradient_norm, report.step)


def _save_checkpoint(run: _Run, seconds: float) -> None:
    if not run.accelerator.is_main_process:
        return
    names = {id(parameter): name for name, parameter in run.trained.items()}
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    state = checkpoints.Checkpoint(
        step=run.step,
        weights=run.trained,
        ema=dict(zip(run.trained, run.ema.shadow_params, strict=True)),
        optimizer=checkpoints.optimizer_tensors(optimizer, names),
        record={"config": run.config.to_json(), "seconds": seconds, "history": run.history, **run.provenance},
    )
    checkpoints.save(run.config.work_folder / "checkpoints", state, keep=run.config.keep)


def _write_output(run: _Run) -> None:
    run.accelerator.wait_for_everyone()
    if not run.accelerator.is_main_process:
        return
    with torch.no_grad():
        for parameter, averaged in zip(run.trained.values(), run.ema.shadow_params, strict=True):
            parameter.copy_(averaged)
    run.pipeline.unet = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()
    report = training_report(run.config, run.step, run.seconds, run.history, run.provenance)
    _save_pipeline(run.config, run.pipeline, {**report, "processes": run.accelerator.num_processes})


def _save_pipeline(config: TrainConfig, pipeline: MTUPipeline, report: Mapping[str, Any]) -> None:
    dtype = getattr(torch, config.save_dtype)
    with staging(config.output, replace=config.force or config.resume, marker=INDEX) as folder:
        for part in (pipeline.unet, pipeline.vae, *pipeline.texts.encoders):
            nn.Module.to(part, dtype)
        pipeline.save_pretrained(folder)
        if (config.model / "samples").is_dir():
            shutil.copytree(config.model / "samples", folder / "samples")
        (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
