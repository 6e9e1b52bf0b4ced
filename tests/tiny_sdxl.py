"""A tiny SDXL pipeline folder, laid out as stabilityai/stable-diffusion-xl-base-1.0 is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

#: Widths of the two text encoders, which add up to the UNet's cross-attention, and what the second one projects to.
WIDTHS, PROJECTION = (12, 20), 32
LENGTH = 16

#: The published scheduler_config.json, but for the class.
EULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def save_sdxl_pipeline(folder: Path, **unet: Any) -> Path:
    """32×32 pictures, 8×8 latents, 16 tokens, two text encoders that number their tokens differently, random weights.

    Args:
        folder: to be made.
        unet: other values of the UNet's config.
    """
    import torch
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from tests.conftest import make_unet

    network = make_unet("sdxl")
    if unet:
        plain = {key: value for key, value in network.config.items() if not key.startswith("_")}
        network = UNet2DConditionModel.from_config({**plain, **unet})
    torch.manual_seed(3)
    parts: dict[str, Any] = {
        "unet": network,
        "vae": AutoencoderKL(
            block_out_channels=(16, 16, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
            scaling_factor=0.13025,
            force_upcast=True,
        ),
        "scheduler": EulerDiscreteScheduler.from_config(EULER),
    }
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    # The second tokenizer pads with "!", which the first one does not know.
    vocabularies = (
        [*words, "<|startoftext|>", "<|endoftext|>"],
        ["!", "!</w>", *reversed(words), "<|startoftext|>", "<|endoftext|>"],
    )
    kinds, layers, acts = (CLIPTextModel, CLIPTextModelWithProjection), (2, 3), ("quick_gelu", "gelu")
    for i, (name, vocabulary) in enumerate(zip(("", "_2"), vocabularies, strict=True)):
        pad = ("<|endoftext|>", "!")[i]
        config = CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=WIDTHS[i],
            intermediate_size=4 * WIDTHS[i],
            projection_dim=PROJECTION,
            num_hidden_layers=layers[i],
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            hidden_act=acts[i],
            bos_token_id=len(vocabulary) - 2,
            eos_token_id=len(vocabulary) - 1,
            pad_token_id=vocabulary.index(pad),
        )
        parts[f"text_encoder{name}"] = kinds[i](config).eval()
        write_tokenizer(folder / f"tokenizer{name}", vocabulary, pad)
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.19.0.dev0",
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": None,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def write_tokenizer(folder: Path, vocabulary: list[str], pad: str) -> None:
    """The files of a published CLIP tokenizer: no ``tokenizer.json``."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": pad,
        "unk_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    config = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def as_published(folder: Path) -> Path:
    """What else lies in such a folder: weights in half precision, in shards, and for other libraries; pickles."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    for path in (folder / "unet").glob("*.safetensors"):
        path.unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="400KB")
    torch.nn.Module.to(unet, torch.float16).save_pretrained(folder / "unet", variant="fp16", max_shard_size="200KB")
    for name in ("text_encoder", "text_encoder_2"):
        (folder / name / "openvino_model.bin").write_bytes(b"0")
        (folder / name / "pytorch_model.bin").write_bytes(b"\x80\x02}")
    shutil.copytree(folder / "vae", folder / "vae_1_0")
    (folder / "sd_xl_base_1.0.safetensors").write_bytes(b"not for this pipeline")
    (folder / "README.md").write_text("# SDXL")
    return folder
