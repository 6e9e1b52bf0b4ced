"""More of the four tasks: further emoji sets, every picture changed anew at every step, and names nobody knows.

What inpainting lacked was not capacity: with a prompt its mean prediction of an unseen emoji was worse than without, as
it had learnt its 1,700 designs by name. So here its prompts often lose words, or have some that mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from examples.emoji import data
from examples.emoji.captions import edits
from examples.emoji.gpu import phases, pools
from examples.emoji.gpu.loop import History
from examples.emoji.gpu.prompts import DamagedPrompts, Prompts, captions_of, token_ids
from examples.emoji.gpu.setting import Setting
from examples.emoji.gpu.task_data import OUTSIDE, SHIFTED, TextPictures, drop, stack, weights_of
from examples.emoji.make_tasks import random_masks
from mtu_compile.core.tasks import Task
from mtu_compile.model.encode import latent_mask
from mtu_compile.model.unet import MTUUNet2DConditionModel

#: Share of a step's examples by task's kind; the rest counts 2.
SHARES = {"t2i": 2, "edit": 2, "sr": 2, "inpaint": 4}
#: How often a picture of a further set is drawn, for one of today's.
FURTHER = 0.5
MASKS = 8192
DROPOUT_RATE = 0.05


@dataclass(frozen=True)
class Change:
    """How often a picture is changed in each way, a share of them not at all."""

    plain: float
    smaller: float = 0.35
    reach: int = 6
    flip: float = 0.4
    upturn: float = 0.0
    recolour: float = 0.0

    def draw(self, count: int, device: torch.device) -> tuple[Tensor, ...]:
        """Arguments for ``pools.Pictures.take``: size, down, right, flip, upturn, order; [count] each."""
        plain = torch.rand(count, device=device) < self.plain

        def sometimes(value: Tensor, share: float) -> Tensor:
            return value.masked_fill(plain | (torch.rand(count, device=device) >= share), 0)

        def whole(low: int, high: int) -> Tensor:
            return torch.randint(low, high, (count,), device=device)

        one = torch.ones(count, dtype=torch.long, device=device)
        shift = [sometimes(whole(-self.reach, self.reach + 1), 0.9) for _ in range(2)]
        return (
            sometimes(whole(1, len(pools.SCALES)), self.smaller),
            *shift,
            sometimes(one, self.flip).bool(),
            sometimes(one, self.upturn).bool(),
            sometimes(whole(1, len(pools.ORDERS)), self.recolour),
        )


EDIT = Change(plain=0.3, reach=4)
SHARPEN = Change(plain=0.2, smaller=0.4, reach=7, flip=0.5, upturn=0.1, recolour=0.4)
INPAINT = Change(plain=0.3, upturn=0.05, recolour=0.2)


def fast_encoder(vae: AutoencoderKL, setting: Setting) -> Callable[[Tensor], Tensor]:
    """``phases.encoder_of``, compiled if the setting asks for it and that works."""
    encode = phases.encoder_of(vae)
    if "tasks" not in setting.compile:
        return encode
    try:
        compiled: Callable[[Tensor], Tensor] = torch.compile(encode, dynamic=False)
        with setting.autocast():
            compiled(torch.zeros(8, 3, data.SIZE, data.SIZE, device=setting.device))
        return compiled
    except Exception as error:  # whatever it is, the run must go on
        setting.say(f"  the encoder does not compile: {type(error).__name__} {str(error)[:300]}")
        torch._dynamo.reset()
        return encode


class FurtherData:
    """Batches of all tasks, drawn, changed, encoded and put together on the GPU.

    Args:
        sizes: examples of each task a step.
        today, sets: the training pictures of the example's own set, and of the further ones.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        sizes: Sequence[int],
        today: Sequence[data.Emoji],
        sets: Sequence[Sequence[data.Emoji]],
        tokenizer: CLIPTokenizer,
        vae: AutoencoderKL,
        setting: Setting,
    ) -> None:
        device = self.device = setting.device
        self.tasks, self.sizes, self.setting = tuple(tasks), tuple(sizes), setting
        self.latents = fast_encoder(vae, setting)
        parts = [list(today), *(list(one) for one in sets if one)]
        emoji = [e for part in parts for e in part]
        self.pictures = pools.Pictures(stack(emoji), device)
        weights = [weights_of(part, device) * (FURTHER if i else 1.0) for i, part in enumerate(parts)]
        self.draw = pools.Draw(torch.cat(weights))
        shifted = pools.variants(min(SHIFTED, setting.variants), least=SHIFTED, strong=False, seed=0)
        known = pools.Pictures(stack(today), device)
        self.text_pictures = TextPictures(today, pools.encode_pool(known, shifted, phases.encoder_of(vae)), device)
        del known
        self.captions = Prompts(captions_of(today), tokenizer, device)
        self.descriptions = DamagedPrompts(captions_of(emoji), tokenizer, device)
        self._pairs(parts, tokenizer)
        self.masks = random_masks(min(MASKS, 64 * setting.variants), device)
        self.empty = token_ids(tokenizer, [""]).to(device)
        self.channels = max(task.condition_channels(vae.config.latent_channels) for task in tasks)
        self.task_ids = torch.repeat_interleave(
            torch.arange(len(tasks), device=device), torch.tensor(self.sizes, device=device)
        )

    def _pairs(self, parts: Sequence[Sequence[data.Emoji]], tokenizer: CLIPTokenizer) -> None:
        """Edits are between pictures of one set."""
        source, target, weight, prompts, before = [], [], [], [], 0
        for i, part in enumerate(parts):
            for e in edits(part):
                source.append(before + e.source)
                target.append(before + e.target)
                prompts.append(e.prompts)
                # Instructions about hair are few.
                hair = 4.0 if "skin" not in e.prompts[0] else 1.0
                weight.append(hair * (1.0 if e.in_domain else OUTSIDE) * (FURTHER if i else 1.0))
            before += len(part)
        self.source, self.target = (torch.tensor(index, device=self.device) for index in (source, target))
        self.draw_pair = pools.Draw(torch.tensor(weight, device=self.device))
        self.instructions = Prompts(prompts, tokenizer, self.device)

    def encode(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Pictures [b, 3, 64, 64] each → scaled latents, all at once."""
        with torch.no_grad(), self.setting.autocast():
            latents = self.latents(torch.cat(list(pixels))).float()
        return list(latents.split([len(x) for x in pixels]))

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents [B, C, h, w], conditions [B, c, h, w] and token ids [B, L], task after task."""
        drawn = [self._kind(task)(size) for task, size in zip(self.tasks, self.sizes, strict=True)]
        latents = iter(self.encode([x for pixels, _, _ in drawn for x in pixels]))
        parts = []
        for task, (pixels, finish, ids) in zip(self.tasks, drawn, strict=True):
            clean, condition = finish(*(next(latents) for _ in pixels))
            parts.append((clean, *drop(task, condition, ids, self.empty, self.channels)))
        clean, condition, ids = (torch.cat(column) for column in zip(*parts, strict=True))
        return clean, condition, ids

    def _kind(self, task: Task) -> Callable[[int], tuple[list[Tensor], Callable[..., tuple[Tensor, Tensor]], Tensor]]:
        """What draws a task's pictures, what makes clean latents and condition of their latents, and token ids."""
        if "mask" in task.condition:
            return self._inpaint
        if task.downscale:
            return self._sharpen
        return self._edit if task.condition else self._from_text

    def _from_text(self, size: int) -> tuple[list[Tensor], Callable[..., tuple[Tensor, Tensor]], Tensor]:
        clean, index = self.text_pictures(size)
        return [], lambda: (clean, clean[:, :0]), self.captions.draw(index)

    def _edit(self, size: int) -> tuple[list[Tensor], Callable[..., tuple[Tensor, Tensor]], Tensor]:
        pair, change = self.draw_pair(size), EDIT.draw(size, self.device)
        pixels = [self.pictures.take(index[pair], *change) for index in (self.target, self.source)]
        return pixels, lambda target, source: (target, source), self.instructions.draw(pair)

    def _sharpen(self, size: int) -> tuple[list[Tensor], Callable[..., tuple[Tensor, Tensor]], Tensor]:
        x = self.pictures.take(self.draw(size), *SHARPEN.draw(size, self.device))
        return [x, pools.small(x)], lambda clean, blurred: (clean, blurred), self.empty.expand(size, -1)

    def _inpaint(self, size: int) -> tuple[list[Tensor], Callable[..., tuple[Tensor, Tensor]], Tensor]:
        index, change = self.draw(size), INPAINT.draw(size, self.device)
        x = self.pictures.take(index, *change)
        mask = self.masks[torch.randint(len(self.masks), (size,), device=self.device)]
        mask = torch.where(torch.rand(size, 1, 1, 1, device=self.device) < 0.5, mask.flip(-1), mask)

        def finish(clean: Tensor, holed: Tensor) -> tuple[Tensor, Tensor]:
            return clean, torch.cat((latent_mask(mask, *clean.shape[-2:]), holed), dim=1)

        # A prompt's colours and directions do not hold for a picture that was recoloured or turned over.
        *_, upturn, order = change
        ids = torch.where((upturn | (order > 0))[:, None], self.empty, self.descriptions.draw(index))
        return [x, x * (1 - mask)], finish, ids


def train(
    unet: MTUUNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    today: Sequence[data.Emoji],
    sets: Sequence[Sequence[data.Emoji]],
    setting: Setting,
    until: float,
    on_tick: Callable[[float], None] = lambda progress: None,
) -> History:
    """All tasks on, the UNet and the text encoder as in ``phases.train_tasks``; the autoencoder stays."""
    shares = [SHARES.get(task.name, 2) for task in unet.tasks]
    sizes = [setting.batch["tasks"] * share // sum(shares) for share in shares]
    draw = FurtherData(unet.tasks, sizes, today, sets, tokenizer, vae, setting)
    setting.say(f"  data ready: {draw.pictures.count} pictures, {len(draw.source)} edits, batch {sizes}")
    return phases.fit_tasks(
        unet, text, draw, sizes, setting, until, rest_rate=7e-4, dropout=DROPOUT_RATE, on_tick=on_tick
    )
