"""The three parts of the recipe: autoencoder, base text-to-image model, four tasks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from examples.emoji import data
from examples.emoji.captions import edits, forms
from examples.emoji.gpu import pools
from examples.emoji.gpu.loop import Group, History, fit
from examples.emoji.make_tasks import random_masks
from examples.emoji.train_base import DROP_TEXT, LENGTH, SCHEDULER
from examples.emoji.train_vae import KL_WEIGHT, gradient_l1
from mtu_compile.core.tasks import Task
from mtu_compile.model.encode import latent_mask
from mtu_compile.model.recipe import DROPOUT
from mtu_compile.model.unet import MTUUNet2DConditionModel

#: Share of pictures outside the domain that the example shows: they teach shapes, the domain is what it is judged by.
OUTSIDE = 0.4
#: Dropout in the residual blocks while training: there are only some 1,700 different designs.
DROPOUT_RATE = 0.1
CAPTION_SLOTS = 8
SHIFTED = 8  # variants that are at most two pixels from the picture, all a prompt alone should see
VARIANTS, STRONG_VARIANTS, MASK_VARIANTS = 20, 28, 36


@dataclass(frozen=True)
class Setting:
    """How a run goes.

    Attributes:
        device: where everything lies.
        batch: examples a step of each part ("vae", "base", "tasks").
        compile: parts whose network is compiled by ``torch.compile`` first.
        graph: record steps as CUDA graphs.
        most_steps: end a part after so many steps, for tests; the clock ends it otherwise.
        variants: pool variants at most, for tests.
    """

    device: torch.device
    batch: dict[str, int]
    compile: frozenset[str] = frozenset()
    graph: bool = True
    most_steps: int | None = None
    variants: int = 1000
    say: Callable[[str], None] = print

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)

    def fit(
        self, groups: Sequence[Group], losses: Callable[[], Tensor], names: Sequence[str], until: float, **more: Any
    ) -> History:
        return fit(
            groups,
            losses,
            until=until,
            most_steps=self.most_steps,
            names=names,
            graph=self.graph,
            say=self.say,
            **more,
        )


def fast(setting: Setting, part: str, call: Callable[..., Tensor], *example: Tensor) -> Callable[..., Tensor]:
    """``call`` compiled, if the setting asks for it and ``example`` goes through forwards and backwards."""
    if part not in setting.compile:
        return call
    began = time.monotonic()
    try:
        compiled: Callable[..., Tensor] = torch.compile(call, dynamic=False)
        with setting.autocast():
            compiled(*example).float().mean().backward()
        setting.say(f"  compiled {part} in {time.monotonic() - began:.0f} s")
        return compiled
    except Exception as error:  # whatever it is, the run must go on
        setting.say(f"  {part} does not compile, goes on without: {type(error).__name__} {str(error)[:300]}")
        torch._dynamo.reset()
        return call


def stack(emoji: Sequence[data.Emoji]) -> np.ndarray:
    return np.stack([e.pixels for e in emoji])


def weights_of(emoji: Sequence[data.Emoji], device: torch.device) -> Tensor:
    """How often each picture is drawn: bases with six tones would otherwise drown those with one picture."""
    count: dict[str, int] = {}
    for e in emoji:
        count[e.base] = count.get(e.base, 0) + 1
    return torch.tensor([count[e.base] ** -0.5 * (1.0 if e.in_domain else OUTSIDE) for e in emoji], device=device)


# --- autoencoder ---


def train_vae(vae: AutoencoderKL, emoji: Sequence[data.Emoji], setting: Setting, until: float) -> History:
    """L1, L1 of the differences, squared error and a small KL.

    A tenth of the pictures each are blurred as super-resolution's inputs, or have a grey hole as inpainting's: their
    latents are conditions. Half of the latents get noise, so that the decoder forgives a diffusion model's errors.
    """
    device, batch = setting.device, setting.batch["vae"]
    pictures = pools.Pictures(stack(emoji), device)
    masks = random_masks(2048, device)
    draw = pools.Draw(weights_of(emoji, device))

    def reconstruct(x: Tensor, level: Tensor) -> Tensor:
        posterior = vae.encode(x).latent_dist
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        z = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        z = z + level.to(z) * z.detach().float().std().to(z) * torch.randn_like(z)
        decoded = vae.decode(z).sample.float()
        difference = decoded - x
        return torch.stack((difference.abs().mean(), gradient_l1(decoded, x), difference.pow(2).mean(), KL_WEIGHT * kl))

    def inputs() -> tuple[Tensor, Tensor]:
        x = pictures.random(draw(batch))
        kind = torch.rand(batch, 1, 1, 1, device=device)
        hole = masks[torch.randint(len(masks), (batch,), device=device)]
        x = torch.where(kind < 0.1, pools.small(x), torch.where(kind < 0.2, x * (1 - hole), x))
        level = (0.4 * torch.rand(batch, 1, 1, 1, device=device) - 0.2).clamp(min=0)
        return x, level

    vae.train()
    step = fast(setting, "vae", reconstruct, *inputs())

    def losses() -> Tensor:
        x, level = inputs()
        with setting.autocast():
            return step(x, level)

    groups = [Group((vae,), 2e-3, 1e-4)]
    history = setting.fit(groups, losses, ("l1", "gradient", "mse", "kl"), until)
    vae.eval()
    return history


def encoder_of(vae: AutoencoderKL) -> Callable[[Tensor], Tensor]:
    """Pictures → scaled latents, the mean of the posterior, as the pipelines make them."""

    def encode(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor

    return encode


# --- prompts ---


class Prompts:
    """Token ids of every way a row may be prompted; the plain way is drawn most."""

    def __init__(self, rows: Sequence[Sequence[str]], tokenizer: CLIPTokenizer, device: torch.device) -> None:
        texts = {text: i for i, text in enumerate(dict.fromkeys(text for row in rows for text in row))}
        self.table = token_ids(tokenizer, list(texts)).to(device)
        slots = []
        for row in rows:
            rest = [row[i % len(row)] for i in range(CAPTION_SLOTS - 3)]
            slots.append([texts[text] for text in (row[0], row[0], row[0], *rest)])
        self.slots = torch.tensor(slots, device=device)

    def draw(self, rows: Tensor) -> Tensor:
        """Ids [b, L] for the rows [b]."""
        slot = torch.randint(CAPTION_SLOTS, rows.shape, device=rows.device)
        return self.table[self.slots[rows, slot]]


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    tokens = tokenizer(list(texts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    ids: Tensor = tokens.input_ids
    return ids


def captions_of(emoji: Sequence[data.Emoji]) -> list[list[str]]:
    toned = {e.base for e in emoji if e.tone}
    return [forms(e, toned=e.base in toned) for e in emoji]


# --- diffusion ---


class Velocity:
    """Noisy latents and velocity targets at timesteps spread evenly over the schedule."""

    def __init__(self, device: torch.device) -> None:
        alphas = SCHEDULER.alphas_cumprod.to(device)
        self.signal, self.noise = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]
        self.total = len(alphas)

    def __call__(self, clean: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps and targets of ``clean`` [b, C, h, w], whose parts have ``sizes``."""
        steps = [
            (torch.arange(n, device=clean.device) + torch.rand(n, device=clean.device)) / n * self.total for n in sizes
        ]
        t = torch.cat(steps).long().clamp(max=self.total - 1)
        noise = torch.randn_like(clean)
        signal, spread = self.signal[t], self.noise[t]
        return signal * clean + spread * noise, t, signal * noise - spread * clean


def set_dropout(unet: nn.Module, rate: float) -> None:
    """Only while training: the configuration that is saved knows no dropout."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.dropout.p = rate


class TextPictures:
    """Pictures under a prompt alone: mostly as they are, some shifted a little, a few mirrored where nobody minds."""

    def __init__(self, emoji: Sequence[data.Emoji], pool: Tensor, device: torch.device) -> None:
        self.pool, self.draw = pool, pools.Draw(weights_of(emoji, device))
        sided = ("left", "right", "pointing", "clock")
        self.may_flip = torch.tensor(
            [
                e.category in ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "People & Body")
                and not any(word in e.base for word in sided)
                for e in emoji
            ],
            device=device,
        )

    def __call__(self, count: int) -> tuple[Tensor, Tensor]:
        """Latents [count, C, h, w] and the pictures' indices."""
        index = self.draw(count)
        device = index.device
        kind = torch.rand(count, device=device)
        last = min(SHIFTED, len(self.pool))
        shifted = torch.randint(min(2, last - 1), last, (count,), device=device)
        mirrored = (kind >= 0.3) & (kind < 0.4) & self.may_flip[index]
        variant = shifted.masked_fill(kind >= 0.3, 0).masked_fill(mirrored, 1)
        return self.pool[variant.clamp(max=len(self.pool) - 1), index], index


def train_base(
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    emoji: Sequence[data.Emoji],
    encode: Callable[[Tensor], Tensor],
    setting: Setting,
    until: float,
) -> History:
    """UNet and text encoder together: v-prediction with zero terminal SNR."""
    device, batch = setting.device, setting.batch["base"]
    pictures = pools.Pictures(stack(emoji), device)
    made = pools.variants(min(SHIFTED, setting.variants), least=SHIFTED, strong=False, seed=0)
    source = TextPictures(emoji, pools.encode_pool(pictures, made, encode), device)
    del pictures
    prompts, empty = Prompts(captions_of(emoji), tokenizer, device), token_ids(tokenizer, [""]).to(device)
    velocity = Velocity(device)
    unet.train()
    text.train()
    set_dropout(unet, DROPOUT_RATE / 2)

    def predict(noisy: Tensor, t: Tensor, states: Tensor) -> Tensor:
        predicted: Tensor = unet(noisy, t, states, return_dict=False)[0]
        return predicted

    clean, index = source(batch)
    noisy, t, _ = velocity(clean, (batch,))
    with setting.autocast():
        states = text(prompts.draw(index)).last_hidden_state.detach()
    step = fast(setting, "base", predict, noisy, t, states)

    def losses() -> Tensor:
        clean, index = source(batch)
        dropped = torch.rand(batch, 1, device=device) < DROP_TEXT
        ids = torch.where(dropped, empty, prompts.draw(index))
        noisy, t, target = velocity(clean, (batch,))
        with setting.autocast():
            predicted = step(noisy, t, text(ids).last_hidden_state)
        return (predicted.float() - target).pow(2).mean()[None]

    history = setting.fit([Group((unet, text), 1e-3)], losses, ("v",), until)
    set_dropout(unet, 0.0)
    return history


class TaskData:
    """Batches of all four tasks, drawn and put together on the GPU.

    Args:
        sizes: examples of each task a step.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        sizes: Sequence[int],
        emoji: Sequence[data.Emoji],
        tokenizer: CLIPTokenizer,
        encode: Callable[[Tensor], Tensor],
        setting: Setting,
    ) -> None:
        device = self.device = setting.device
        self.tasks, self.sizes = tuple(tasks), tuple(sizes)
        pictures = pools.Pictures(stack(emoji), device)
        mild = pools.variants(min(VARIANTS, setting.variants), least=SHIFTED, strong=False, seed=0)
        strong = pools.variants(min(STRONG_VARIANTS, setting.variants), least=2, strong=True, seed=1)
        self.clean = pools.encode_pool(pictures, mild, encode)
        self.sharp = pools.encode_pool(pictures, strong, encode)
        self.blurred = pools.encode_pool(pictures, strong, encode, lambda x, number, i: pools.small(x))
        # Each mask variant of a picture lies over one of its mild variants.
        self.masks_of = min(MASK_VARIANTS, setting.variants)
        masks = random_masks(4096, device)
        generator = torch.Generator().manual_seed(2)
        choice = torch.randint(len(masks), (self.masks_of, len(emoji)), generator=generator).to(device)
        self.mask_variant = torch.arange(self.masks_of, device=device) % len(mild)
        over = [mild[i % len(mild)] for i in range(self.masks_of)]
        self.holed = pools.encode_pool(pictures, over, encode, lambda x, number, i: x * (1 - masks[choice[number, i]]))
        self.mask = latent_mask(masks, *self.clean.shape[-2:])
        self.choice = choice
        self.text_pictures = TextPictures(emoji, self.clean, device)
        self.draw = pools.Draw(weights_of(emoji, device))
        self.captions = Prompts(captions_of(emoji), tokenizer, device)
        pairs = edits(emoji)
        self.source = torch.tensor([e.source for e in pairs], device=device)
        self.target = torch.tensor([e.target for e in pairs], device=device)
        self.instructions = Prompts([e.prompts for e in pairs], tokenizer, device)
        # Instructions about hair are few.
        weight = [(4.0 if "skin" not in e.prompts[0] else 1.0) * (1.0 if e.in_domain else OUTSIDE) for e in pairs]
        self.draw_pair = pools.Draw(torch.tensor(weight, device=device))
        self.empty = token_ids(tokenizer, [""]).to(device)
        self.channels = max(task.condition_channels(self.clean.shape[2]) for task in tasks)
        self.task_ids = torch.repeat_interleave(
            torch.arange(len(tasks), device=device), torch.tensor(self.sizes, device=device)
        )

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents [B, C, h, w], conditions [B, c, h, w] and token ids [B, L], task after task."""
        parts = []
        for task, size in zip(self.tasks, self.sizes, strict=True):
            clean, condition, ids = self._kind(task)(size)
            text_only, condition_only, both = DROPOUT[task.guidance]
            chance = torch.rand(size, device=self.device)
            no_text = (chance < text_only) | (
                (chance >= text_only + condition_only) & (chance < text_only + condition_only + both)
            )
            no_condition = (chance >= text_only) & (chance < text_only + condition_only + both)
            ids = torch.where(no_text[:, None], self.empty, ids)
            condition = condition.masked_fill(no_condition[:, None, None, None], 0.0)
            padded = nn.functional.pad(condition, (0, 0, 0, 0, 0, self.channels - condition.shape[1]))
            parts.append((clean, padded, ids))
        clean, condition, ids = (torch.cat(column) for column in zip(*parts, strict=True))
        return clean, condition, ids

    def _kind(self, task: Task) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
        if "mask" in task.condition:
            return self._inpaint
        if task.downscale:
            return self._sharpen
        return self._edit if task.condition else self._from_text

    def _from_text(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        clean, index = self.text_pictures(size)
        return clean, clean[:, :0], self.captions.draw(index)

    def _variant(self, size: int, count: int, plain: float) -> Tensor:
        """Variant numbers, a share of them 0."""
        drawn = torch.randint(count, (size,), device=self.device)
        return drawn.masked_fill(torch.rand(size, device=self.device) < plain, 0)

    def _edit(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        pair = self.draw_pair(size)
        variant = self._variant(size, len(self.clean), 0.3)
        return (
            self.clean[variant, self.target[pair]],
            self.clean[variant, self.source[pair]],
            self.instructions.draw(pair),
        )

    def _sharpen(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        index, variant = self.draw(size), self._variant(size, len(self.sharp), 0.2)
        return self.sharp[variant, index], self.blurred[variant, index], self.empty.expand(size, -1)

    def _inpaint(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        index, variant = self.draw(size), torch.randint(self.masks_of, (size,), device=self.device)
        condition = torch.cat((self.mask[self.choice[variant, index]], self.holed[variant, index]), dim=1)
        return self.clean[self.mask_variant[variant], index], condition, self.captions.draw(index)


def train_tasks(
    unet: MTUUNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    emoji: Sequence[data.Emoji],
    encode: Callable[[Tensor], Tensor],
    setting: Setting,
    until: float,
    on_tick: Callable[[float], None] = lambda progress: None,
) -> History:
    """All tasks at once; unlike the paper's, this run trains the backbone and the text encoder on, at half the rate."""
    device = setting.device
    size = setting.batch["tasks"] // len(unet.tasks)
    sizes = [size] * len(unet.tasks)
    draw = TaskData(unet.tasks, sizes, emoji, tokenizer, encode, setting)
    setting.say(
        f"  pools: {sum(t.numel() * 4 for t in (draw.clean, draw.sharp, draw.blurred, draw.holed)) / 1e9:.2f} GB"
    )
    velocity = Velocity(device)
    unet.train()
    text.train()
    set_dropout(unet, DROPOUT_RATE)

    def predict(sample: Tensor, t: Tensor, states: Tensor) -> Tensor:
        predicted: Tensor = unet(sample, t, states, task_ids=draw.task_ids, return_dict=False)[0]
        return predicted

    def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        clean, condition, ids = draw()
        noisy, t, target = velocity(clean, sizes)
        return torch.cat((noisy, condition), dim=1), t, ids, target

    sample, t, ids, _ = batch()
    with setting.autocast():
        states = text(ids).last_hidden_state.detach()
    step = fast(setting, "tasks", predict, sample, t, states)

    def losses() -> Tensor:
        sample, t, ids, target = batch()
        with setting.autocast():
            predicted = step(sample, t, text(ids).last_hidden_state)
        return (predicted.float() - target).pow(2).mean(dim=(1, 2, 3)).unflatten(0, (len(sizes), -1)).mean(dim=1)

    upcycled = [m for n, m in unet.named_modules() if n.endswith(".ff") or n in ("task_conv_in", "task_embedding")]
    chosen = {id(p) for m in upcycled for p in m.parameters()}
    rest = nn.ParameterList([p for p in unet.parameters() if id(p) not in chosen])
    groups = [Group(upcycled, 1e-3), Group((rest, text), 5e-4)]
    history = setting.fit(groups, losses, [task.name for task in unet.tasks], until, on_tick=on_tick)
    set_dropout(unet, 0.0)
    return history
