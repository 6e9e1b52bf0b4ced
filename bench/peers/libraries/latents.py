"""Sizes of a UNet's inputs, from the configs that every library keeps beside its files."""

from __future__ import annotations

import json
from pathlib import Path


def unet_shapes(folder: Path, size: int) -> dict[str, tuple[int, ...]]:
    """By diffusers' name of an input, its shape for two samples and pictures of ``size``."""
    vae = next(path for name in ("vae", "vae_decoder") if (path := folder / name / "config.json").exists())
    unet, autoencoder, text = (
        json.loads(path.read_text())
        for path in (folder / "unet" / "config.json", vae, folder / "text_encoder" / "config.json")
    )
    side = size >> (len(autoencoder["block_out_channels"]) - 1)
    return {
        "sample": (2, unet["in_channels"], side, side),
        "timestep": (1,),
        "encoder_hidden_states": (2, text["max_position_embeddings"], unet["cross_attention_dim"]),
    }
