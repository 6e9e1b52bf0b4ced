"""Batches of pictures, conditions and prompts, drawn and put together on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from examples.emoji import data
from examples.emoji.captions import edits
from examples.emoji.gpu import pools
from examples.emoji.gpu.prompts import Prompts, captions_of, token_ids
from examples.emoji.gpu.setting import Setting
from examples.emoji.make_tasks import random_masks
from mtu_compile.core.tasks import Task
from mtu_compile.model.encode import latent_mask
from mtu_compile.model.recipe import DROPOUT

#: Share of pictures outside the domain that the example shows: they teach shapes, the domain is what it is judged by.
OUTSIDE = 0.4
SHIFTED = 8  # variants that are at most two pixels from the picture, all a prompt alone should see
VARIANTS, STRONG_VARIANTS, MASK_VARIANTS = 20, 28, 36


def stack(emoji: Sequence[data.Emoji]) -> np.ndarray:
    return np.stack([e.pixels for e in emoji])


def weights_of(emoji: Sequence[data.Emoji], device: torch.device) -> Tensor:
    """How often each picture is drawn: bases with six tones would otherwise drown those with one picture."""
    count: dict[str, int] = {}
    for e in emoji:
        count[e.base] = count.get(e.base, 0) + 1
    return torch.tensor([count[e.base] ** -0.5 * (1.0 if e.in_domain else OUTSIDE) for e in emoji], device=device)


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


def drop(task: Task, condition: Tensor, ids: Tensor, empty: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Without prompt, condition or both now and then, for classifier-free guidance.

    Returns:
        The condition [b, channels, h, w], with zeros behind its own channels, and token ids [b, L]; ``empty``, those of
        the empty prompt, where there is none.
    """
    text_only, condition_only, both = DROPOUT[task.guidance]
    chance = torch.rand(len(ids), device=ids.device)
    no_text = (chance < text_only) | (
        (chance >= text_only + condition_only) & (chance < text_only + condition_only + both)
    )
    no_condition = (chance >= text_only) & (chance < text_only + condition_only + both)
    ids = torch.where(no_text[:, None], empty, ids)
    condition = condition.masked_fill(no_condition[:, None, None, None], 0.0)
    return nn.functional.pad(condition, (0, 0, 0, 0, 0, channels - condition.shape[1])), ids


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
            parts.append((clean, *drop(task, condition, ids, self.empty, self.channels)))
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
