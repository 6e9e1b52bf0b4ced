"""Settings of a training run, and what a run reports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mtu_compile.core.errors import ConfigError
from mtu_compile.core.fit import Fit
from mtu_compile.core.seeds import check_seed

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
        fit: what becomes of pictures of other proportions than the model's (``mtu_compile.runtime.fitting``).
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
    fit: Fit = "crop"
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
        check_seed(self.seed)
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
