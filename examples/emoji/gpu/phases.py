"""The three parts of the recipe: autoencoder, base text-to-image model, four tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from examples.emoji import data
from examples.emoji.gpu import pools
from examples.emoji.gpu.diffusion import DROPOUT_RATE, Velocity, set_dropout
from examples.emoji.gpu.loop import Group, History
from examples.emoji.gpu.prompts import Prompts, captions_of, token_ids
from examples.emoji.gpu.setting import Setting, fast
from examples.emoji.gpu.task_data import SHIFTED, TaskData, TextPictures, stack, weights_of
from examples.emoji.make_tasks import random_masks
from examples.emoji.train_base import DROP_TEXT
from examples.emoji.train_vae import KL_WEIGHT, gradient_l1
from mtu_compile.model.unet import MTUUNet2DConditionModel


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
    size = setting.batch["tasks"] // len(unet.tasks)
    sizes = [size] * len(unet.tasks)
    draw = TaskData(unet.tasks, sizes, emoji, tokenizer, encode, setting)
    setting.say(
        f"  pools: {sum(t.numel() * 4 for t in (draw.clean, draw.sharp, draw.blurred, draw.holed)) / 1e9:.2f} GB"
    )
    return fit_tasks(unet, text, draw, sizes, setting, until, rest_rate=5e-4, dropout=DROPOUT_RATE, on_tick=on_tick)


class Drawn(Protocol):
    """Examples of every task, one after the other."""

    task_ids: Tensor

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        """Clean latents, conditions and token ids."""
        ...


def fit_tasks(
    unet: MTUUNet2DConditionModel,
    text: CLIPTextModel,
    draw: Drawn,
    sizes: Sequence[int],
    setting: Setting,
    until: float,
    *,
    rest_rate: float,
    dropout: float,
    on_tick: Callable[[float], None] = lambda progress: None,
) -> History:
    """Fit UNet and text encoder to what ``draw`` gives, ``sizes`` examples of each task.

    Args:
        rest_rate: learning rate of what is not upcycled; that has 1e-3.
        dropout: rate of the UNet's while it trains.
    """
    velocity = Velocity(setting.device)
    unet.train()
    text.train()
    set_dropout(unet, dropout)

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
        error = (predicted.float() - target).pow(2).mean(dim=(1, 2, 3))
        return torch.stack([part.mean() for part in error.split(list(sizes))])

    upcycled = [m for n, m in unet.named_modules() if n.endswith(".ff") or n in ("task_conv_in", "task_embedding")]
    chosen = {id(p) for m in upcycled for p in m.parameters()}
    rest = nn.ParameterList([p for p in unet.parameters() if id(p) not in chosen])
    groups = [Group(upcycled, 1e-3), Group((rest, text), rest_rate)]
    history = setting.fit(groups, losses, [task.name for task in unet.tasks], until, on_tick=on_tick)
    set_dropout(unet, 0.0)
    unet.eval()
    text.eval()
    return history
