"""UNets of OpenVINO's files alone, and the sizes of their inputs from the configs that libraries keep beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


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


def openvino_unets(folder: Path, size: int, count: int) -> list[Any]:
    """``count`` UNets, compiled for two samples and run once."""
    import openvino

    core, kept, shapes = openvino.Core(), [], unet_shapes(folder, size)
    for _ in range(count):
        network = core.read_model(folder / "unet" / "openvino_model.xml")
        scalar = not len(network.input("timestep").partial_shape)
        wanted = {**shapes, **({"timestep": ()} if scalar else {})}
        network.reshape({name: list(shape) for name, shape in wanted.items()})
        request = core.compile_model(network, "CPU").create_infer_request()
        request.infer({name: np.zeros(shape, np.float32) for name, shape in wanted.items()})
        kept.append(request)
    return kept
