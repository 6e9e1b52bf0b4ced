"""A small CLIP of the emoji, held apart from the model's own encoder, and how it ranks what the model makes.

    python -m examples.emoji.score_clip train --work build/emoji --seconds 40     # contrastive, on the training part
    python -m examples.emoji.score_clip score --work build/emoji                  # right prompt first among 16?

Trained on the same pictures and captions as the model, held-out emoji left out.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from examples.emoji import data
from examples.emoji.gpu import pools
from examples.emoji.gpu.loop import Group, fit
from examples.emoji.gpu.prompts import Prompts, captions_of, token_ids
from examples.emoji.gpu.task_data import stack, weights_of
from examples.emoji.train_base import LENGTH

WIDTH = 128
CHOICES = 16
FILE = "clip.safetensors"


class Block(nn.Module):  # type: ignore[misc]
    def __init__(self, channels: int, stride: int, out: int) -> None:
        super().__init__()
        self.norm, self.first = nn.GroupNorm(8, channels), nn.Conv2d(channels, out, 3, stride, 1)
        self.second_norm, self.second = nn.GroupNorm(8, out), nn.Conv2d(out, out, 3, 1, 1)
        self.skip = nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(F.silu(self.second_norm(self.first(F.silu(self.norm(x))))))
        return y + self.skip(x)


class SmallCLIP(nn.Module):  # type: ignore[misc]
    """Pictures [n, 3, 64, 64] in [-1, 1] and token ids [n, L] into one space of ``WIDTH`` numbers."""

    def __init__(self, tokens: int, end: int) -> None:
        super().__init__()
        self.end = end
        channels = (32, 64, 96, 128, 192)
        stages = [Block(a, 2, b) for a, b in pairwise(channels)]
        self.picture = nn.Sequential(nn.Conv2d(3, channels[0], 3, 1, 1), *stages)
        self.from_picture = nn.Linear(channels[-1] * 16, WIDTH)
        self.embed, self.place = nn.Embedding(tokens, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 256, 0.0, batch_first=True, norm_first=True)
        self.text = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.from_text = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(2.6))

    def pictures(self, x: Tensor) -> Tensor:
        return F.normalize(self.from_picture(self.picture(x).flatten(1)).float(), dim=-1)

    def prompts(self, ids: Tensor) -> Tensor:
        # The end token also pads: a word is what is not the end.
        words = (ids != self.end).float()[..., None]
        states = self.text(self.embed(ids) + self.place.weight)
        return F.normalize(self.from_text((states * words).sum(1) / words.sum(1)).float(), dim=-1)


def train(
    emoji: Sequence[data.Emoji],
    tokenizer: CLIPTokenizer,
    device: torch.device,
    seconds: float,
    batch: int,
    steps: int | None = None,
) -> SmallCLIP:
    """Contrastive training on augmented pictures; the same base in one batch is no wrong answer unless its tone is."""
    model = SmallCLIP(len(tokenizer), tokenizer.eos_token_id).to(device)
    pictures = pools.Pictures(stack(emoji), device)
    prompts = Prompts(captions_of(emoji), tokenizer, device)
    draw = pools.Draw(weights_of(emoji, device))

    def losses() -> Tensor:
        index = draw(batch)
        zero = torch.zeros_like(index)
        shift = [torch.randint(-4, 5, index.shape, device=device) for _ in range(2)]
        flip = torch.rand(batch, device=device) < 0.2
        x = pictures.take(index, torch.randint(0, 2, index.shape, device=device), *shift, flip, zero.bool(), zero)
        # What a diffusion model makes is a little noisy, soft and off in colour.
        x = x + torch.randn(batch, 3, 1, 1, device=device) * 0.05
        x = x + torch.rand(batch, 1, 1, 1, device=device) * 0.2 * torch.randn_like(x)
        with torch.autocast(device.type, torch.bfloat16):
            seen, said = model.pictures(x), model.prompts(prompts.draw(index))
        logits = seen @ said.T * model.scale.exp().clamp(max=50)
        # The same picture drawn twice is not a wrong answer.
        twin = (index[:, None] == index[None]) & ~torch.eye(batch, dtype=torch.bool, device=device)
        logits = logits.masked_fill(twin, -1e4)
        goal = torch.arange(batch, device=device)
        return (F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal))[None] / 2

    fit([Group((model,), 1e-3, 0.05)], losses, until=time.monotonic() + seconds, most_steps=steps)
    return model.eval()


def save(model: SmallCLIP, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().cpu().contiguous() for k, v in model.state_dict().items()}, folder / FILE)


def load(folder: Path, tokenizer: CLIPTokenizer) -> SmallCLIP:
    model = SmallCLIP(len(tokenizer), tokenizer.eos_token_id)
    model.load_state_dict({k: v.float() for k, v in load_file(folder / FILE).items()})
    return model.eval()


@torch.no_grad()  # type: ignore[untyped-decorator]
def first_among(
    model: SmallCLIP, tokenizer: CLIPTokenizer, made: Sequence[Image.Image], prompts: Sequence[str], seed: int = 0
) -> float:
    """Share of pictures whose own prompt ranks first among ``CHOICES`` of ``prompts`` drawn at random."""
    pixels = torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in made])).permute(0, 3, 1, 2)
    scores = model.pictures(pixels.float() / 127.5 - 1) @ model.prompts(token_ids(tokenizer, prompts)).T
    return ranked_first(scores, prompts, seed)


def ranked_first(scores: Tensor, prompts: Sequence[str], seed: int = 0) -> float:
    """``first_among`` for the similarities [n, n] of pictures and prompts."""
    rng, right = random.Random(seed), 0
    for i in range(len(prompts)):
        others = rng.sample([j for j in range(len(prompts)) if prompts[j] != prompts[i]], CHOICES - 1)
        right += bool(scores[i, i] > scores[i, others].max())
    return right / len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "score"))
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"))
    parser.add_argument("--model", type=Path, help="the pipeline to score; WORK/mtu by default")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--limit", type=int, default=160, help="pictures to make and score")
    parser.add_argument("--every", type=int, default=1, help="use every so manieth picture only (to try it out)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    emoji = data.load(args.cache)[:: args.every]
    known = [e for e in emoji if not e.held_out]
    pipeline = args.model or args.work / "mtu"
    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    if args.what == "train":
        save(train(known, tokenizer, device, args.seconds, args.batch, args.steps), args.work)
        return
    model = load(args.work, tokenizer)
    results = {}
    for name, part in (("training", known), ("held out", [e for e in emoji if e.held_out])):
        part = [e for e in part if e.in_domain]
        part = random.Random(0).sample(part, min(args.limit, len(part)))
        prompts = [e.caption for e in part]
        results[f"{name}, true pictures"] = first_among(
            model, tokenizer, [Image.fromarray(e.pixels) for e in part], prompts
        )
        results[name] = first_among(model, tokenizer, sample(pipeline, prompts), prompts)
    (args.work / "clip.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def sample(folder: Path, prompts: Sequence[str]) -> list[Image.Image]:
    from mtu_compile.model.pipeline import MTUPipeline

    pipeline = MTUPipeline.from_pretrained(folder)
    return [pipeline(p, task="t2i", seed=i, num_inference_steps=20).images[0] for i, p in enumerate(prompts)]


if __name__ == "__main__":
    main()
