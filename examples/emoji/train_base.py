"""Train the base text-to-image model on the latents of the trained autoencoder. Resumes from its last checkpoint.

    python -m examples.emoji.train_base --work build/emoji --steps 5000

Writes a Stable Diffusion pipeline folder (``build/emoji/base``): text encoder and UNet trained together, v-prediction
with zero terminal SNR (white backgrounds leave no room for a leaked mean), EMA weights. The schedule is warm-up,
constant, linear decay over the last fifth, so that a longer run can go on from a checkpoint of a shorter one.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.emoji import data
from examples.emoji.train_vae import save, to_tensor

LENGTH = 32
PEAK_LR = 8e-4
WARM_UP = 200
DROP_TEXT = 0.1
VOCABULARY = 1280
START, END = "<|startoftext|>", "<|endoftext|>"

SCHEDULER = DDIMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
    clip_sample=False,
    set_alpha_to_one=False,
)


def build_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE with ``</w>``) whose merges are learnt from the captions."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    tokens = [*sorted(alphabet), *(f"{c}</w>" for c in sorted(alphabet))]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learnt["merges"]]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens = [*dict.fromkeys(tokens), START, END]
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (Path(scratch) / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        tokenizer = CLIPTokenizer.from_pretrained(scratch, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=4,
    )


class Captions:
    """Token ids for every way a picture may be captioned; one is drawn at random a step."""

    def __init__(self, emoji: list[data.Emoji], tokenizer: CLIPTokenizer) -> None:
        toned = {e.base for e in emoji if e.tone}
        self.choices = []
        for e in emoji:
            texts = [e.caption, e.caption, f"{e.tone}, {e.base}" if e.tone else e.caption]
            if e.tone is None and e.base in toned:
                texts.append(f"{e.base}, {data.YELLOW}")
            self.choices.append(self._ids(tokenizer, texts))
        self.empty = self._ids(tokenizer, [""])[0]

    @staticmethod
    def _ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        return tokens.input_ids

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        rows = []
        for i in index.tolist():
            if torch.rand((), generator=generator) < DROP_TEXT:
                rows.append(self.empty)
            else:
                choice = self.choices[i]
                rows.append(choice[torch.randint(len(choice), (), generator=generator)])
        return torch.stack(rows)


def learning_rate(step: int, steps: int) -> float:
    decay = max(1, steps // 5)
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (steps - step) / decay))


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel, text: CLIPTextModel, vae: AutoencoderKL, ids: Tensor, empty: Tensor, seed: int = 0
) -> Tensor:
    """Pictures [n, 3, 64, 64] in [0, 1] for token ids [n, L]: 20 DDIM steps, guidance 3."""
    scheduler = DDIMScheduler.from_config(SCHEDULER.config)
    scheduler.set_timesteps(20)
    states = text(torch.cat((empty.expand_as(ids), ids))).last_hidden_state
    latents = torch.randn((len(ids), 4, 16, 16), generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        without, given = unet(torch.cat((latents, latents)), t, states).sample.chunk(2)
        latents = scheduler.step(without + 3.0 * (given - without), t, latents).prev_sample
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


def save_grid(path: Path, pictures: Tensor, columns: int) -> None:
    from diffusers.utils import make_image_grid, numpy_to_pil

    images = numpy_to_pil(pictures.permute(0, 2, 3, 1).numpy())
    make_image_grid(images, rows=math.ceil(len(images) / columns), cols=columns).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--cache", type=Path, default=Path("build/emoji"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()

    emoji = [e for e in data.load(args.cache) if e.in_domain and not e.held_out]
    base = args.work / "base"
    vae = AutoencoderKL.from_pretrained(args.work / "vae").eval()
    # The tokenizer may know the held-out names too; no model weight ever sees them.
    names = [e.caption for e in data.load(args.cache) if e.in_domain] + list(data.EDIT_PROMPTS)
    tokenizer = build_tokenizer(names, base / "tokenizer")
    captions = Captions(emoji, tokenizer)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mode() for x in to_tensor(emoji).split(64)])
        latents = latents * vae.config.scaling_factor
    # Bases with six tones would otherwise drown those with one picture.
    count = {b: sum(e.base == b for e in emoji) for b in {e.base for e in emoji}}
    weights = torch.tensor([count[e.base] ** -0.5 for e in emoji])

    torch.manual_seed(0)
    unet, text = build_unet(), build_text_encoder(tokenizer)
    both = torch.nn.ModuleDict({"unet": unet, "text": text})
    print(
        f"{len(emoji)} pictures; parameters: "
        + str({k: sum(p.numel() for p in m.parameters()) for k, m in both.items()})
    )
    optimizer = torch.optim.AdamW(both.parameters(), PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-3)
    ema = EMAModel(both.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    checkpoint = args.work / "base.ckpt"
    start, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start, spent = state["step"], state["seconds"]

    began, smooth = time.time() - spent, None
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * learning_rate(step, args.steps)
        generator = torch.Generator().manual_seed(step)
        index = torch.multinomial(weights, args.batch, replacement=True, generator=generator)
        clean, ids = latents[index], captions.draw(index, generator)
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(SCHEDULER.config.num_train_timesteps, (args.batch,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            states = text(ids).last_hidden_state
            predicted = unet(SCHEDULER.add_noise(clean, noise, t), t, states, return_dict=False)[0]
        loss = (predicted.float() - SCHEDULER.get_velocity(clean, noise, t)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        ema.step(both.parameters())
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 49:
            print(f"step {step + 1} loss {smooth:.4f} {time.time() - began:.0f} s", flush=True)
        if step % 500 == 499 or step + 1 == args.steps:
            state = {"model": both.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            save(checkpoint, {**state, "step": step + 1, "seconds": time.time() - began})
            ema.store(both.parameters())
            ema.copy_to(both.parameters())
            both.eval()
            shown = torch.arange(0, len(emoji), len(emoji) // 32)[:32]
            pictures = sample(unet, text, vae, torch.stack([captions.choices[i][0] for i in shown]), captions.empty)
            save_grid(args.work / f"base-{step + 1:05}.png", pictures, 8)
            if step + 1 == args.steps:
                for name, part in (("unet", unet), ("text_encoder", text), ("vae", vae), ("scheduler", SCHEDULER)):
                    part.save_pretrained(base / name)
                (base / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
            both.train()
            ema.restore(both.parameters())


MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.0",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

if __name__ == "__main__":
    main()
