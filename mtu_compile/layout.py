"""The folder layout of diffusers exports, which OpenVINO GenAI and optimum-intel read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

#: ``model_index.json`` of an exported Stable Diffusion pipeline.
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "text_encoder": ["optimum", "OVModelTextEncoder"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["optimum", "OVModelUnet"],
    "vae_decoder": ["optimum", "OVModelVaeDecoder"],
    "vae_encoder": ["optimum", "OVModelVaeEncoder"],
}

#: What only the multi-task UNet has in its config.
MULTI_TASK_KEYS = ("tasks", "num_experts", "d_task", "router_width", "norm_per_expert", "top_k")


def write_layout(pipeline: MTUPipeline, folder: Path) -> None:
    """Tokenizer, scheduler, ``model_index.json`` and each part's ``config.json`` beside the engines."""
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    index = {**MODEL_INDEX, "scheduler": ["diffusers", type(pipeline.scheduler).__name__]}
    _dump(folder / "model_index.json", index)
    unet = {key: value for key, value in pipeline.unet.config.items() if key not in MULTI_TASK_KEYS}
    configs = {
        "text_encoder": pipeline.text_encoder.config.to_dict(),
        "vae_encoder": dict(pipeline.vae.config),
        "vae_decoder": dict(pipeline.vae.config),
        "unet": {**unet, "_class_name": "UNet2DConditionModel"},
    }
    for name, config in configs.items():
        if (folder / name).is_dir():
            # "_name_or_path" is where the model lay on the machine it was built on.
            _dump(folder / name / "config.json", {k: v for k, v in config.items() if k != "_name_or_path"})


def _dump(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
