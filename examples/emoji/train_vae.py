"""Train the autoencoder: 64×64 RGB ↔ 16×16×4 latents. Resumes from its last checkpoint.

    python -m examples.emoji.train_vae --work build/emoji --steps 2400

Loss: L1 + L1 of the finite differences (edges carry an emoji) + a small KL. The latents' scale is measured over the
training set at the end and stored as ``scaling_factor``, as Stable Diffusion's autoencoder does.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from examples.emoji import data

KL_WEIGHT = 1e-5
PEAK_LR = 1.5e-3


def build() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        mid_block_add_attention=False,
        latent_channels=4,
        sample_size=data.SIZE,
    )


def to_tensor(emoji: list[data.Emoji]) -> Tensor:
    """``[n, 3, 64, 64]`` in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([e.pixels for e in emoji]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def gradient_l1(a: Tensor, b: Tensor) -> Tensor:
    dx = (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean()
    dy = (a.diff(dim=-2) - b.diff(dim=-2)).abs().mean()
    return dx + dy


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels over pictures in [-1, 1], averaged over the batch of pictures."""
    mse = (a - b).pow(2).mean(dim=(1, 2, 3)) / 4
    return float((-10 * mse.log10()).mean())


def save(path: Path, state: object) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


@torch.no_grad()
def evaluate(vae: AutoencoderKL, pictures: Tensor) -> float:
    decoded = [vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) for x in pictures.split(64)]
    return psnr(torch.cat(decoded), pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    emoji = data.load(args.cache)
    train = to_tensor([e for e in emoji if not e.held_out])
    held_out = to_tensor([e for e in emoji if e.held_out])
    torch.manual_seed(0)
    vae = build()
    optimizer = torch.optim.AdamW(vae.parameters(), PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=args.steps + 1, pct_start=0.08)
    checkpoint = args.work / "vae.ckpt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]

    began = time.time()
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(step)
        batch = train[torch.randint(len(train), (args.batch,), generator=generator)]
        if torch.rand((), generator=generator) < 0.5:
            batch = batch.flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample(generator)).sample
        decoded = decoded.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = (decoded - batch).abs().mean() + gradient_l1(decoded, batch) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1} loss {loss.item():.4f} kl {kl.item():.1f} {time.time() - began:.0f} s", flush=True)
        if step % 200 == 199 or step + 1 == args.steps:
            vae.eval()
            print(f"step {step + 1} held-out PSNR {evaluate(vae, held_out[:128]):.2f} dB", flush=True)
            vae.train()
            save(
                checkpoint,
                {
                    "model": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "step": step + 1,
                },
            )

    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in train.split(64)])
    vae.register_to_config(scaling_factor=1.0 / float(latents.std()))
    print(f"latents mean {latents.mean(dim=(0, 2, 3)).tolist()} std {latents.std(dim=(0, 2, 3)).tolist()}")
    print(f"held-out PSNR {evaluate(vae, held_out):.2f} dB")
    vae.save_pretrained(args.work / "vae")


if __name__ == "__main__":
    main()
