"""The paper's recipe (Chavhan et al., ICML 2025, section 4.1): what is trained, on what loss, at what rate."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from mtu_compile.core.errors import ModelError
from mtu_compile.core.tasks import Task
from mtu_compile.model.data import Batch
from mtu_compile.model.experts import TaskExperts
from mtu_compile.model.text import Encoded
from mtu_compile.model.train_config import TrainConfig
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


def require_trainable(unet: MTUUNet2DConditionModel) -> None:
    """``ModelError`` for a UNet that this recipe's loss would break: one that was distilled to take big steps."""
    if (width := unet.config.time_cond_proj_dim) is not None:
        raise ModelError(
            f"a latent consistency model (time_cond_proj_dim = {width}) cannot be trained by the noise's error",
            hint="upcycle and train the model it was distilled from",
        )


def trained_parameters(unet: MTUUNet2DConditionModel) -> dict[str, nn.Parameter]:
    """Experts, routers, task norms, task embedding and task input convolutions, by name."""
    prefixes = ["task_embedding."]
    prefixes += [f"{name}." for name, module in unet.named_modules() if isinstance(module, TaskExperts | TaskConvIn)]
    return {name: p for name, p in unet.named_parameters() if name.startswith(tuple(prefixes))}


def make_optimizer(config: TrainConfig, trained: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    # Norms start at 1 and the task embedding is a table: decay would pull both towards what they should not be.
    decayed = [p for name, p in trained.items() if name.endswith(".weight") and "norm" not in name and p.dim() > 1]
    decayed = [p for p in decayed if p is not trained["task_embedding.weight"]]
    chosen = {id(p) for p in decayed}
    rest = [p for p in trained.values() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def loss_weights(noise: DDPMScheduler, gamma: float | None) -> Tensor:
    """Weight [timesteps] of each timestep's squared error; min-SNR weights for ε and v as in Hang et al., ICCV 2023."""
    kind = noise.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"the scheduler's prediction type {kind!r} cannot be trained", hint="use epsilon or v_prediction"
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


def drop_conditions(task: Task, batch: Batch, empty: Encoded, rng: np.random.Generator) -> Batch:
    """The batch with a share of its texts and conditions dropped, as classifier-free guidance needs.

    Args:
        empty: [1, …], what the UNet gets instead of a text.
    """
    text_only, condition_only, both = DROPOUT[task.guidance]
    draw = torch.from_numpy(rng.random(len(batch.latents)))
    no_text = (draw < text_only) | ((draw >= text_only + condition_only) & (draw < text_only + condition_only + both))
    no_condition = (draw >= text_only) & (draw < text_only + condition_only + both)
    assert empty.pooled is not None
    return Batch(
        batch.latents,
        torch.where(no_condition[:, None, None, None], 0.0, batch.condition),
        torch.where(no_text[:, None, None], empty.states, batch.text),
        torch.where(no_text[:, None], empty.pooled, batch.pooled),
    )
