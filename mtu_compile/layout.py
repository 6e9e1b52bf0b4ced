"""The folder layout of diffusers exports, which OpenVINO GenAI and optimum-intel read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Layout:
    """``config.json`` of each part by folder name, and ``model_index.json``: all that is kept of the float model."""

    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, pipeline: MTUPipeline) -> Layout:
        """What other tools want to know of ``pipeline``'s parts."""
        unet = {key: value for key, value in pipeline.unet.config.items() if key not in MULTI_TASK_KEYS}
        configs = {
            "text_encoder": pipeline.text_encoder.config.to_dict(),
            "vae_encoder": dict(pipeline.vae.config),
            "vae_decoder": dict(pipeline.vae.config),
            "unet": {**unet, "_class_name": "UNet2DConditionModel"},
        }
        # "_name_or_path" is where the model lay on the machine it was built on.
        tidy = {name: {k: v for k, v in one.items() if k != "_name_or_path"} for name, one in configs.items()}
        return cls({**MODEL_INDEX, "scheduler": ["diffusers", type(pipeline.scheduler).__name__]}, tidy)

    def write(self, folder: Path) -> None:
        """Write the files beside the engines in ``folder``; a part whose folder is not there is left out."""
        _dump(folder / "model_index.json", self.index)
        for name, config in self.configs.items():
            if (folder / name).is_dir():
                _dump(folder / name / "config.json", config)


def _dump(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
