"""Configs of the published Stable Diffusion families, as their repositories have them, without any weights.

Sources: runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1, stabilityai/stable-diffusion-xl-base-1.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Config = Mapping[str, Any]

_NOTHING: Config = MappingProxyType({})

_NOISE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

_CROSS, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"

_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
}

_FOUR_LEVELS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_CROSS, _CROSS, _CROSS, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP],
}

_VAE = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

_TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "pad_token_id": 1,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}

#: CLIP's ViT-L/14, the text encoder of SD 1.x and the first of SDXL.
_VIT_L = {
    **_TEXT,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
}


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder and the tokenizer it reads.

    Attributes:
        kind: class in transformers.
        config: its ``config.json``.
        pad: the tokenizer's padding token.
        position_ids: whether the weights hold them too, as transformers before 4.31 wrote them.
    """

    kind: str
    config: Config
    pad: str = "<|endoftext|>"
    position_ids: bool = True


@dataclass(frozen=True)
class Family:
    """What a published repository says of its pipeline.

    Attributes:
        index: ``model_index.json`` but for the components below.
        unet, vae, scheduler: their configs.
        text_encoders: by name of the component, of which ``tokenizer…`` goes with ``text_encoder…``.
        old_attention: the autoencoder's attention has the names of diffusers before 0.17 (``query`` for ``to_q``).
        extras: other JSON files, by their path in the folder.
        experts: N of the multi-task UNet; the paper takes 4 for SD 1.5 and 1 for SDXL.
    """

    index: Config
    unet: Config
    vae: Config
    scheduler: Config
    text_encoders: Mapping[str, TextEncoder]
    old_attention: bool = True
    extras: Mapping[str, Config] = field(default_factory=dict)
    experts: int = 4


_PREPROCESSOR = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}

#: What matters of the safety checker's 180 lines; nothing here reads it.
_SAFETY = {
    "_name_or_path": "CompVis/stable-diffusion-safety-checker",
    "architectures": ["StableDiffusionSafetyChecker"],
    "initializer_factor": 1.0,
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": None,
}

FAMILIES: Mapping[str, Family] = {
    "sd15": Family(
        index={
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.6.0",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        },
        unet={
            **_UNET,
            **_FOUR_LEVELS,
            "_diffusers_version": "0.6.0",
            "attention_head_dim": 8,
            "cross_attention_dim": 768,
            "sample_size": 64,
        },
        vae={**_VAE, "_diffusers_version": "0.6.0", "sample_size": 512},
        scheduler={"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **_NOISE},
        text_encoders={
            "text_encoder": TextEncoder(
                "CLIPTextModel",
                {**_VIT_L, "_name_or_path": "openai/clip-vit-large-patch14", "transformers_version": "4.22.0.dev0"},
            )
        },
        extras={
            "feature_extractor/preprocessor_config.json": _PREPROCESSOR,
            "safety_checker/config.json": _SAFETY,
        },
    ),
    "sd21": Family(
        index={
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.8.0",
            "feature_extractor": ["transformers", "CLIPImageProcessor"],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
        },
        unet={
            **_UNET,
            **_FOUR_LEVELS,
            "_diffusers_version": "0.10.0.dev0",
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "sample_size": 96,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        vae={
            **_VAE,
            "_diffusers_version": "0.8.0",
            "_name_or_path": "hf-models/stable-diffusion-v2-768x768/vae",
            "sample_size": 768,
        },
        scheduler={
            "_class_name": "DDIMScheduler",
            "_diffusers_version": "0.8.0",
            **_NOISE,
            "prediction_type": "v_prediction",
        },
        text_encoders={
            "text_encoder": TextEncoder(
                "CLIPTextModel",
                {
                    **_TEXT,
                    "_name_or_path": "hf-models/stable-diffusion-v2-768x768/text_encoder",
                    "hidden_act": "gelu",
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_attention_heads": 16,
                    "num_hidden_layers": 23,
                    "projection_dim": 512,
                    "transformers_version": "4.25.0.dev0",
                },
                pad="!",
            )
        },
        extras={"feature_extractor/preprocessor_config.json": _PREPROCESSOR},
    ),
    "sdxl": Family(
        index={
            "_class_name": "StableDiffusionXLPipeline",
            "_diffusers_version": "0.19.0.dev0",
            "add_watermarker": None,
            "force_zeros_for_empty_prompt": True,
        },
        unet={
            **_UNET,
            "_diffusers_version": "0.19.0.dev0",
            "addition_embed_type": "text_time",
            "addition_embed_type_num_heads": 64,
            "addition_time_embed_dim": 256,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "class_embed_type": None,
            "class_embeddings_concat": False,
            "conv_in_kernel": 3,
            "conv_out_kernel": 3,
            "cross_attention_dim": 2048,
            "cross_attention_norm": None,
            "down_block_types": ["DownBlock2D", _CROSS, _CROSS],
            "dual_cross_attention": False,
            "encoder_hid_dim": None,
            "encoder_hid_dim_type": None,
            "mid_block_only_cross_attention": None,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "num_attention_heads": None,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "projection_class_embeddings_input_dim": 2816,
            "resnet_out_scale_factor": 1.0,
            "resnet_skip_time_act": False,
            "resnet_time_scale_shift": "default",
            "sample_size": 128,
            "time_cond_proj_dim": None,
            "time_embedding_act_fn": None,
            "time_embedding_dim": None,
            "time_embedding_type": "positional",
            "timestep_post_act": None,
            "transformer_layers_per_block": [1, 2, 10],
            "up_block_types": [_CROSS_UP, _CROSS_UP, "UpBlock2D"],
            "upcast_attention": None,
            "use_linear_projection": True,
        },
        vae={
            **_VAE,
            "_diffusers_version": "0.20.0.dev0",
            "_name_or_path": "../sdxl-vae/",
            "force_upcast": True,
            "sample_size": 1024,
            "scaling_factor": 0.13025,
        },
        scheduler={
            "_class_name": "EulerDiscreteScheduler",
            "_diffusers_version": "0.19.0.dev0",
            **_NOISE,
            "interpolation_type": "linear",
            "prediction_type": "epsilon",
            "sample_max_value": 1.0,
            "timestep_spacing": "leading",
            "use_karras_sigmas": False,
        },
        text_encoders={
            "text_encoder": TextEncoder(
                "CLIPTextModel",
                {**_VIT_L, "torch_dtype": "float16", "transformers_version": "4.32.0.dev0"},
                position_ids=False,
            ),
            "text_encoder_2": TextEncoder(
                "CLIPTextModelWithProjection",
                {
                    **_TEXT,
                    "architectures": ["CLIPTextModelWithProjection"],
                    "hidden_act": "gelu",
                    "hidden_size": 1280,
                    "intermediate_size": 5120,
                    "num_attention_heads": 20,
                    "num_hidden_layers": 32,
                    "projection_dim": 1280,
                    "torch_dtype": "float16",
                    "transformers_version": "4.32.0.dev0",
                },
                pad="!",
                position_ids=False,
            ),
        },
        old_attention=False,
        experts=1,
    ),
}
