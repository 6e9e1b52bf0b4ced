"""Train experts, routers, task norms and input convolutions on all tasks at once; the pretrained rest is frozen.

The paper's recipe (Chavhan et al., ICML 2025, section 4.1): the sum over tasks of the prediction error, one UNet call
for all tasks. Everything random in a step is drawn from (seed, step, process), so a resumed run needs no generator
state to see the same data, noise and timesteps again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mtu_compile import __version__
from mtu_compile.bundle.atomic import staging
from mtu_compile.core.errors import ConfigError, InputError, ModelError
from mtu_compile.core.hashing import model_sha256
from mtu_compile.core.progress import Progress
from mtu_compile.core.rows import Row
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.model import checkpoint as checkpoints
from mtu_compile.model import data
from mtu_compile.model.experts import TaskExperts
from mtu_compile.model.folder import INDEX, check_destination
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.unet import MTUUNet2DConditionModel, TaskConvIn

#: Share of the examples that lose (prompt only, condition only, both), by kind of guidance.
#: Sources: 10 % as in Stable Diffusion; 5 % each as in InstructPix2Pix (Brooks et al., section 3.2.1).
DROPOUT: dict[str, tuple[float, float, float]] = {
    "none": (0.0, 0.0, 0.0),
    "text": (0.1, 0.0, 0.0),
    "text+image": (0.05, 0.05, 0.05),
}

#: Smallest min-SNR weight. At zero terminal SNR the weight of a velocity would be 0, and the first step of every
#: sampling, which decides the picture's layout, would never be trained.
LEAST_WEIGHT = 0.1

#: Settings that may differ between a run and its continuation.
FREE = frozenset(
    {"model", "data", "output", "work", "steps", "save_every", "keep", "resume", "force", "save_dtype", "max_hours"}
    | {"stop_at", "cache_gb", "gradient_checkpointing", "cpu"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        model: MTU pipeline folder to start from.
        data: folder with one image folder a task, ``data/<task>/metadata.jsonl``.
        output: MTU pipeline folder to write (EMA weights).
        work: checkpoints, TensorBoard log and cache; ``<output>.train`` by default.
        tasks: tasks to train; all of the model's by default.
        steps: optimizer steps.
        batch_size: examples a step for each task and process.
        accumulate: micro-batches of ``batch_size`` a step.
        learning_rate: peak.
        schedule: ``cosine`` to zero or ``constant``, both after a linear warm-up.
        warmup: share of the steps the learning rate rises for.
        weight_decay: of AdamW, on weight matrices only.
        clip: largest norm of the gradient.
        ema: decay of the moving average.
        min_snr: gamma of min-SNR weighting (Hang et al., ICCV 2023), or ``None`` for equal weights.
        mixed_precision: ``no`` or ``bf16`` (autocast).
        seed: of data order, noise, timesteps, masks and dropout.
        streaming: read the data line by line and keep nothing, for sets of any size.
        mask_variants: random masks kept for each picture of an inpainting task.
        cache_gb: encoded sets larger than this (10^9 bytes, all tasks together) are encoded again at every step.
        gradient_checkpointing: less memory, more time.
        save_every: steps between checkpoints.
        keep: checkpoints kept.
        resume: go on from the last checkpoint, if there is one.
        force: replace ``output``, and start over if there are checkpoints and ``resume`` is not set.
        save_dtype: of the written pipeline's weights.
        max_hours: stop in good order, with a checkpoint and ``output``, when this run has taken so long.
        stop_at: stop in good order at this step, leaving the schedule as it is.
        cpu: leave a GPU unused.
    """

    model: Path
    data: Path
    output: Path
    work: Path | None = None
    tasks: tuple[str, ...] = ()
    steps: int = 10_000
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    min_snr: float | None = None
    mixed_precision: Literal["no", "bf16"] = "no"
    seed: int = 0
    streaming: bool = False
    mask_variants: int = 8
    cache_gb: float = 8.0
    gradient_checkpointing: bool = False
    save_every: int = 500
    keep: int = 2
    resume: bool = False
    force: bool = False
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    max_hours: float | None = None
    stop_at: int | None = None
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "mask_variants", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, it has to be at least 1")
        if not (0 <= self.ema < 1 and 0 <= self.warmup <= 1 and self.learning_rate > 0):
            raise ConfigError("ema has to be in [0, 1), warmup in [0, 1], learning_rate above 0")

    @property
    def work_folder(self) -> Path:
        return self.work or self.output.with_name(f"{self.output.name}.train")

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {key: os.fspath(value) if isinstance(value, Path) else value for key, value in data.items()}


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: its number (from 1), the losses summed and by task, and what it took."""

    step: int
    steps: int
    loss: float
    losses: Mapping[str, float]
    learning_rate: float
    gradient_norm: float
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What a run left: the pipeline folder, steps done, whether that is all of them, and the last step's losses."""

    output: Path
    step: int
    finished: bool
    losses: Mapping[str, float]
    hours: float


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
    empty: Tensor  # [L, D], embedding of the empty prompt
    sources: dict[str, data.Source] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0  # of earlier runs
    history: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)


def trained_parameters(unet: MTUUNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Experts, routers, task norms, task embedding and task input convolutions, by name."""
    prefixes = ["task_embedding."]
    prefixes += [f"{name}." for name, module in unet.named_modules() if isinstance(module, TaskExperts | TaskConvIn)]
    return {name: p for name, p in unet.named_parameters() if name.startswith(tuple(prefixes))}


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
    _save_pipeline(config, pipeline, _report(config, saved.step, record["seconds"], record["history"], record))
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
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
        part.to(accelerator.device)
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
    sources = _sources(config, accelerator, pipeline, tasks, provenance["model_sha256"], progress)

    optimizer = _optimizer(config, trained)
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
        weights=_loss_weights(noise, config.min_snr).to(accelerator.device),
        empty=_encoder(config, pipeline).prompts([""])[0],
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
    for name in (f.name for f in fields(config) if f.name not in FREE):
        if before.get(name) != now[name]:
            raise ConfigError(
                f"the run to resume had {name} = {before.get(name)!r}, this one has {now[name]!r}",
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


def _optimizer(config: TrainConfig, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    # Norms start at 1 and the task embedding is a table: decay would pull both towards what they should not be.
    decayed = [p for name, p in trained.items() if name.endswith(".weight") and "norm" not in name and p.dim() > 1]
    decayed = [p for p in decayed if p is not trained["task_embedding.weight"]]
    chosen = {id(p) for p in decayed}
    rest = [p for p in trained.values() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _encoder(config: TrainConfig, pipeline: MTUPipeline) -> data.Encoder:
    height, width = pipeline.default_size
    return data.Encoder(
        vae=pipeline.vae,
        tokenizer=pipeline.tokenizer,
        text_encoder=pipeline.text_encoder,
        height=height,
        width=width,
        mask_variants=config.mask_variants,
        seed=config.seed,
    )


def _sources(
    config: TrainConfig,
    accelerator: Any,
    pipeline: MTUPipeline,
    tasks: tuple[tuple[int, Task], ...],
    model: str,
    progress: Progress,
) -> dict[str, data.Source]:
    encoder = _encoder(config, pipeline)
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


def _encoded_bytes(task: Task, rows: tuple[Row, ...], encoder: data.Encoder, pipeline: MTUPipeline) -> int:
    channels = int(pipeline.unet.latent_channels)
    latent = 4 * (encoder.height // pipeline.vae_scale) * (encoder.width // pipeline.vae_scale)
    targets = len({row.target for row in rows})
    conditions = data.encoded_pictures(task, rows, encoder) - targets
    width = int(pipeline.text_encoder.config.hidden_size)
    prompts = len({row.prompt for row in rows}) * int(pipeline.tokenizer.model_max_length) * width * 4
    return latent * (targets * channels + conditions * task.condition_channels(channels)) + prompts


def _task_seed(config: TrainConfig, task: Task) -> int:
    # A task's data order does not depend on which other tasks are trained with it.
    return int(np.random.SeedSequence([config.seed, *task.name.encode()]).generate_state(1)[0])


def _loss_weights(noise: DDPMScheduler, gamma: float | None) -> Tensor:
    """Weight [timesteps] of each timestep's squared error; min-SNR weights for ε and v as in Hang et al., ICCV 2023."""
    kind = noise.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"the scheduler's prediction type {kind!r} can not be trained", hint="use epsilon or v_prediction"
        )
    alphas = noise.alphas_cumprod.double()
    if gamma is None:
        return torch.ones_like(alphas).float()
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=gamma) / (snr + 1 if kind == "v_prediction" else snr.clamp(min=1e-8))
    return weights.clamp(min=LEAST_WEIGHT).float()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of step number ``step``, from 0."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * (step - warm) / max(1, config.steps - warm))) / 2


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
        draws = [config.seed, run.step, micro, rank, task_id]
        batch = run.sources[task.name].take(position, size, np.random.default_rng([*draws, 0]))
        rng = np.random.default_rng([*draws, 1])
        text, condition = _drop(task, batch, run.empty, rng)
        # Stratified over the schedule: every batch sees all noise levels, so the loss is less noisy.
        total = run.noise.config.num_train_timesteps
        timesteps = np.floor((rng.permutation(size) + rng.random(size)) / size * total).astype(np.int64)
        noise = rng.standard_normal(tuple(batch.latents.shape), dtype=np.float32)
        padded = nn.functional.pad(condition, (0, 0, 0, 0, 0, channels - condition.shape[1]))
        ids = torch.full((size,), task_id)
        parts.append((batch.latents, padded, text, torch.from_numpy(noise), torch.from_numpy(timesteps), ids))
    # Dropout inside the UNet, where a configuration has any, draws from torch's own generator.
    seeds = np.random.SeedSequence([config.seed, run.step, micro, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(seeds[0] >> 1))
    device = run.accelerator.device
    return _Batch(*(torch.cat(column).to(device) for column in zip(*parts, strict=True)))


def _drop(task: Task, batch: data.Batch, empty: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Text and condition with a share of them dropped, as classifier-free guidance needs."""
    text_only, condition_only, both = DROPOUT[task.guidance]
    draw = torch.from_numpy(rng.random(len(batch.latents)))
    no_text = (draw < text_only) | ((draw >= text_only + condition_only) & (draw < text_only + condition_only + both))
    no_condition = (draw >= text_only) & (draw < text_only + condition_only + both)
    text = torch.where(no_text[:, None, None], empty, batch.text)
    return text, torch.where(no_condition[:, None, None, None], 0.0, batch.condition)


def _losses(run: _Run, batch: _Batch) -> Tensor:
    """Weighted mean squared error of each task, [tasks]."""
    noisy = run.noise.add_noise(batch.latents, batch.noise, batch.timesteps)
    if run.noise.config.prediction_type == "v_prediction":
        target = run.noise.get_velocity(batch.latents, batch.noise, batch.timesteps)
    else:
        target = batch.noise
    sample = torch.cat([noisy, batch.condition], dim=1)
    predicted = run.model(sample, batch.timesteps, batch.text, task_ids=batch.task_ids, return_dict=False)[0]
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
    report = _report(run.config, run.step, run.seconds, run.history, run.provenance)
    _save_pipeline(run.config, run.pipeline, {**report, "processes": run.accelerator.num_processes})


def _save_pipeline(config: TrainConfig, pipeline: MTUPipeline, report: Mapping[str, Any]) -> None:
    dtype = getattr(torch, config.save_dtype)
    with staging(config.output, replace=config.force or config.resume, marker=INDEX) as folder:
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            nn.Module.to(part, dtype)
        pipeline.save_pretrained(folder)
        if (config.model / "samples").is_dir():
            shutil.copytree(config.model / "samples", folder / "samples")
        (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _report(
    config: TrainConfig, step: int, seconds: float, history: list[dict[str, Any]], record: Mapping[str, Any]
) -> dict[str, Any]:
    """``training.json``: what was trained, on what, for how long, and how the losses went."""
    return {
        "steps": step,
        "finished": step >= config.steps,
        "hours": round(seconds / 3600, 4),
        "losses": list(_thinned(history)),
        "hardware": _hardware(),
        "model_sha256": record["model_sha256"],
        "versions": {"mtu-compile": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "config": {k: v for k, v in config.to_json().items() if k not in {"model", "data", "output", "work"}},
    }


def _thinned(history: list[dict[str, Any]], points: int = 200) -> Iterator[dict[str, Any]]:
    """At most ``points`` means over equal stretches of the run: single steps are noisy."""
    stretch = max(1, math.ceil(len(history) / points))
    for start in range(0, len(history), stretch):
        part = history[start : start + stretch]
        means = {key: float(np.mean([row[key] for row in part])) for key in part[0] if key != "step"}
        yield {"step": part[-1]["step"], **means}


def _hardware() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": name, "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}
