"""What networks make of rows they were not trained on, many networks and rows at once, on the GPU.

The pictures are those of ``publish.evaluate``, with the same sampler and guidance; only the batch is larger.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor
from transformers import CLIPTokenizer

from examples.emoji import data
from examples.emoji.captions import edits
from examples.emoji.gpu import pools
from examples.emoji.gpu.diffusion import Velocity
from examples.emoji.gpu.prompts import token_ids
from examples.emoji.gpu.task_data import stack
from examples.emoji.make_tasks import seeded_mask
from examples.emoji.train_base import SCHEDULER
from mtu_compile.core.guidance import ROWS, combine
from mtu_compile.core.tasks import Task
from mtu_compile.model.encode import latent_mask

STEPS = 20
MASKS = 3  # of every picture
NOISES = 16  # timesteps at which the prediction error of a row is measured
MOST = 6144  # samples of one UNet call

#: (sample [n, c, h, w], timesteps [n], text states [n, L, D], cells) → predictions; the n samples lie cell after cell.
Predict = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


@dataclass(frozen=True)
class Rows:
    """Rows of one task.

    Attributes:
        truth: [n, 3, 64, 64], uint8.
        clean: [n, C, h, w], its latents.
        condition: [n, c, h, w], padded to the widest task's.
        ids: [n, L], token ids of the prompts.
        states, empty: [n, L, D] and [1, L, D], what the text encoder makes of the prompts and of the empty one.
        hole: [n, 1, 64, 64], true where it was to be painted; ``None`` where all of it is.
        prompts: n texts.
    """

    truth: Tensor
    clean: Tensor
    condition: Tensor
    ids: Tensor
    states: Tensor
    empty: Tensor
    hole: Tensor | None
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.truth)


def rows_of(
    task: Task,
    emoji: Sequence[data.Emoji],
    tokenizer: CLIPTokenizer,
    encode: Callable[[Tensor], Tensor],
    read: Callable[[Tensor], Tensor],
    device: torch.device,
    *,
    most: int | None = None,
) -> Rows:
    """The rows that ``emoji`` make for ``task``: each picture, or each edit, prompted in the plain way.

    Args:
        encode: pictures [b, 3, 64, 64] in [-1, 1] → scaled latents.
        read: token ids [n, L] → text states [n, L, D].
        most: rows drawn by chance, if there are more.
    """
    pixels = torch.from_numpy(stack(emoji)).permute(0, 3, 1, 2).to(device)
    pairs = edits(emoji)
    rng, hole = random.Random(0), None
    if "mask" in task.condition:
        chosen = [i for i in range(len(emoji)) for _ in range(MASKS)]
        hole = torch.from_numpy(np.stack([np.asarray(seeded_mask(rng)) for _ in chosen])[:, None] > 0).to(device)
    else:
        chosen = list(range(len(pairs) if task.condition and not task.downscale else len(emoji)))
    if most is not None and len(chosen) > most:
        kept = sorted(rng.sample(range(len(chosen)), most))
        chosen, hole = [chosen[i] for i in kept], hole if hole is None else hole[kept]
    is_edit = bool(task.condition) and hole is None and not task.downscale
    index = torch.tensor([pairs[i].target for i in chosen] if is_edit else chosen, device=device)
    truth = pixels[index].float() / 127.5 - 1
    if hole is not None:
        masked = torch.cat([encode(x) for x in (truth * ~hole).split(512)])
        condition = torch.cat((latent_mask(hole.float(), *masked.shape[-2:]), masked), dim=1)
    elif task.downscale:
        condition = torch.cat([encode(pools.small(x, task.downscale)) for x in truth.split(512)])
    elif is_edit:
        source = pixels[torch.tensor([pairs[i].source for i in chosen], device=device)].float() / 127.5 - 1
        condition = torch.cat([encode(x) for x in source.split(512)])
    else:
        condition = truth[:, :0, :16, :16]
    prompts = [pairs[i].prompts[0] if is_edit else "" if task.downscale else emoji[i].caption for i in chosen]
    clean = torch.cat([encode(x) for x in truth.split(512)])
    ids = token_ids(tokenizer, prompts).to(device)
    return Rows(
        truth=pixels[index],
        clean=clean,
        condition=torch.nn.functional.pad(condition, (0, 0, 0, 0, 0, 1 + clean.shape[1] - condition.shape[1])),
        ids=ids,
        states=read(ids),
        empty=read(token_ids(tokenizer, [""]).to(device)),
        hole=hole,
        prompts=tuple(prompts),
    )


def noise_of(rows: Rows, seed: int) -> Tensor:
    """The same for every network."""
    drawn = torch.randn(rows.clean.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(rows.clean.device)


@torch.no_grad()  # type: ignore[untyped-decorator]
def sample(predict: Predict, task: Task, rows: Rows, cells: Sequence[int]) -> Tensor:
    """Latents [cells, n, C, h, w] that every cell's network makes of every row, from the same noise."""
    noise, kinds = noise_of(rows, 1), ROWS[task.guided]
    chunk = max(1, MOST // (len(kinds) * len(cells)))
    made = []
    for part in torch.arange(len(rows), device=noise.device).split(chunk):
        scheduler = DDIMScheduler.from_config(SCHEDULER.config)
        scheduler.set_timesteps(STEPS)
        states = torch.stack([rows.states[part] if k.prompt else rows.empty.expand(len(part), -1, -1) for k in kinds])
        states = states.flatten(0, 1).repeat(len(cells), 1, 1)
        condition = torch.stack([rows.condition[part] * float(k.condition) for k in kinds])
        latents = noise[part].expand(len(cells), -1, -1, -1, -1)
        for t in scheduler.timesteps:
            # [cells, kinds, n, …]: a cell's samples lie together.
            given = torch.stack([torch.cat((latents, c.expand(len(cells), *c.shape)), dim=2) for c in condition], dim=1)
            flat = given.flatten(0, 2)
            times = torch.full((len(flat),), int(t), device=flat.device)
            out = predict(flat, times, states, cells).float()
            answers = out.unflatten(0, given.shape[:3]).unbind(dim=1)
            out = combine(task.guided, answers, task.guidance_scale, task.image_guidance_scale)
            latents = scheduler.step(out, t, latents).prev_sample
        made.append(latents)
    return torch.cat(made, dim=1)


@torch.no_grad()  # type: ignore[untyped-decorator]
def prediction_error(predict: Predict, rows: Rows, cells: Sequence[int]) -> list[float]:
    """Each cell's mean squared error of the velocity, the training loss, over all rows at ``NOISES`` timesteps."""
    device = rows.clean.device
    velocity = Velocity(device)
    sums, chunk = torch.zeros(len(cells), device=device), max(1, MOST // len(cells))
    for number in range(NOISES):
        noise = noise_of(rows, 100 + number)
        t = torch.full((len(rows),), int((number + 0.5) / NOISES * velocity.total), device=device)
        signal, spread = velocity.signal[t], velocity.noise[t]
        given = torch.cat((signal * rows.clean + spread * noise, rows.condition), dim=1)
        target = signal * noise - spread * rows.clean
        for part in torch.arange(len(rows), device=device).split(chunk):
            flat = given[part].repeat(len(cells), 1, 1, 1)
            states = rows.states[part].repeat(len(cells), 1, 1)
            out = predict(flat, t[part].repeat(len(cells)), states, cells).float()
            errors = (out.unflatten(0, (len(cells), -1)) - target[part]).pow(2)
            sums += errors.mean(dim=(2, 3, 4)).sum(dim=1)
    return [float(value) for value in sums / (NOISES * len(rows))]


@torch.no_grad()  # type: ignore[untyped-decorator]
def pictures(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Latents [n, C, h, w] → pictures [n, 3, 64, 64], uint8."""
    parts = [vae.decode(x / vae.config.scaling_factor).sample for x in latents.split(1024)]
    return ((torch.cat(parts) + 1) * 127.5).round().clamp(0, 255).byte()


def psnr(truth: Tensor, made: Tensor, hole: Tensor | None = None) -> Tensor:
    """PSNR [n] in decibels of pictures [n, 3, H, W], uint8; of the holes alone where they are given."""
    error = (truth.double() - made.double()).pow(2).mean(dim=1, keepdim=True)
    where = torch.ones_like(error) if hole is None else hole.double()
    mean = (error * where).sum(dim=(1, 2, 3)) / where.sum(dim=(1, 2, 3))
    return 10 * torch.log10(255.0**2 / mean.clamp(min=1e-10))


def frechet(made: Tensor, real: Tensor) -> float:
    """Fréchet distance of two sets of features [n, d], as in FID (Heusel et al., NeurIPS 2017)."""
    (mean, spread), (other_mean, other_spread) = ((x.mean(dim=0), x.T.cov()) for x in (made.double(), real.double()))
    root = torch.linalg.eigvals(spread @ other_spread).sqrt().real.sum()
    return float((mean - other_mean).pow(2).sum() + spread.trace() + other_spread.trace() - 2 * root)
