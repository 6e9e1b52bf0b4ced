"""UNets as they are published: which go in, as the same function, and which are refused by key and value."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import UNet2DConditionModel

import passes
from mtu_compile.core.errors import ModelError
from mtu_compile.core.tasks import PAPER_TASKS, Task
from mtu_compile.model import export
from mtu_compile.model.unet import MTUUNet2DConditionModel
from mtu_compile.model.unet_support import CARRIED, RULES, check_unet
from mtu_compile.model.upcycle import upcycle_folder, upcycle_unet

SMALL = {"d_task": 8, "router_width": 8}

#: The smallest UNet with two levels and every kind of block of the Stable Diffusion family.
BASE = {
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}

CROSS = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}

#: What sets a published family's UNet apart from Stable Diffusion 1.5's.
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd21": {"attention_head_dim": (4, 8), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "ssd1b": {
        **CROSS,
        "mid_block_type": None,
        "transformer_layers_per_block": [[1], [2]],
        "reverse_transformer_layers_per_block": [[2, 1], [1, 1]],
    },
    "tiny-sd": {"mid_block_type": None},
    "lcm": {"time_cond_proj_dim": 16},
    "kolors": {"encoder_hid_dim": 48, "encoder_hid_dim_type": "text_proj"},
    "16-channel-latents": {"in_channels": 16, "out_channels": 16},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
}

#: Other values of keys that are carried.
CARRIED_VALUES: dict[str, dict[str, Any]] = {
    "timesteps": {"flip_sin_to_cos": False, "freq_shift": 1},
    "fourier": {"time_embedding_type": "fourier"},
    "time-embedding": {"time_embedding_dim": 48, "time_embedding_act_fn": "gelu", "timestep_post_act": "mish"},
    "activation": {"act_fn": "mish", "norm_eps": 1e-3, "mid_block_scale_factor": 1.4, "downsample_padding": 0},
    "kernels": {"conv_in_kernel": 1, "conv_out_kernel": 5, "layers_per_block": (1, 2), "dropout": 0.1},
    "widths": {"cross_attention_dim": (32, 32), "mid_block_type": "UNetMidBlock2D"},
    "labels": {"num_class_embeds": 5},
    "label-as-timestep": {"class_embed_type": "timestep"},
    "attention-without-text": {
        "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}


def make(config: dict[str, Any]) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**BASE, **config}).eval()


def inputs_of(unet: UNet2DConditionModel, label: int | None) -> dict[str, Any]:
    """What diffusers' UNet takes, for two samples."""
    config, generator = unet.config, torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs: dict[str, Any] = {
        "sample": noise(2, config.in_channels, 8, 8),
        "timestep": torch.tensor([501.0]),
        "encoder_hidden_states": noise(2, 7, config.encoder_hid_dim or 32),
    }
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = noise(2, config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": noise(2, 32), "time_ids": noise(2, 6).abs()}
    if label is not None:
        inputs["class_labels"] = torch.full((2,), label)
    return inputs


def label_of(unet: UNet2DConditionModel) -> int | None:
    return 3 if unet.config.num_class_embeds is not None or unet.config.class_embed_type is not None else None


def relative(actual: Any, expected: Any) -> float:
    actual, expected = np.asarray(actual), np.asarray(expected)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def upcycled(unet: UNet2DConditionModel, experts: int = 4) -> MTUUNet2DConditionModel:
    tasks = [replace(task, class_label=label_of(unet)) for task in PAPER_TASKS[:2]]
    return upcycle_unet(unet, tasks, num_experts=experts, **SMALL).eval()


@pytest.mark.parametrize("name", [*FAMILIES, *CARRIED_VALUES])
@torch.no_grad()
def test_a_carried_config_starts_as_diffusers_function(name: str) -> None:
    plain = make({**FAMILIES, **CARRIED_VALUES}[name])
    inputs = inputs_of(plain, label_of(plain))
    expected = plain(**inputs).sample
    inputs.pop("class_labels", None)  # the tasks have theirs
    for experts in (1, 4):
        actual = upcycled(plain, experts)(**inputs, task_ids=torch.tensor([0, 1])).sample
        assert relative(actual, expected) < 1e-5


#: Two graphs instead of twenty: what is carried side by side is carried alone.
GRAPHS = {
    "families": {
        **FAMILIES["ssd1b"],
        **FAMILIES["scale-shift"],
        **FAMILIES["16-channel-latents"],
        "use_linear_projection": True,
        "upcast_attention": True,
        "class_embed_type": "timestep",
    },
    "blocks and embeddings": {
        **CARRIED_VALUES["time-embedding"],
        **FAMILIES["kolors"],
        **CARRIED_VALUES["kernels"],
        **FAMILIES["lcm"],
        "time_embedding_type": "fourier",
        "num_class_embeds": 5,
        "act_fn": "mish",
        "layers_per_block": (1, 2, 1),
        "block_out_channels": (32, 32, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "CrossAttnUpBlock2D"),
        "mid_block_only_cross_attention": True,
        "cross_attention_norm": "group_norm",
    },
}


@pytest.mark.parametrize(
    "name",
    [pytest.param("families", marks=pytest.mark.heavy), pytest.param("blocks and embeddings", marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_a_tasks_graph_is_diffusers_function(name: str, tmp_path: Path) -> None:
    plain = make(GRAPHS[name])
    inputs = inputs_of(plain, label_of(plain))
    expected = plain(**inputs).sample
    dynamic = export.export_unet(upcycled(plain, 2), tmp_path / "dynamic", text_length=7)
    context = passes.PassContext(0, channels=plain.config.in_channels, batch=2, height=8, width=8, text_length=7)
    passes.run_pipeline(dynamic, tmp_path / "task.onnx", passes.TASK_PIPELINE, context)
    session = onnxruntime.InferenceSession(tmp_path / "task.onnx", providers=["CPUExecutionProvider"])
    feeds = {one.name: inputs[one.name].numpy() for one in session.get_inputs()}
    assert ("timestep_cond" in feeds) == (plain.config.time_cond_proj_dim is not None)
    assert relative(session.run(None, feeds)[0], expected) < 1e-5


REFUSED: dict[str, Any] = {
    "center_input_sample": True,
    "down_block_types": ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock3D",
    "up_block_types": ["SkipUpBlock2D", "CrossAttnUpBlock2D"],
    "only_cross_attention": [True, False],
    "norm_num_groups": None,
    "cross_attention_dim": [32, 64],
    "encoder_hid_dim_type": "ip_image_proj",
    "num_attention_heads": 8,
    "dual_cross_attention": True,
    "class_embed_type": "projection",
    "addition_embed_type": "text",
    "resnet_time_scale_shift": "ada_group",
    "time_cond_proj_dim": 2,
    "attention_type": "gated",
    "class_embeddings_concat": True,
}


def test_every_key_of_diffusers_is_carried_or_has_a_rule() -> None:
    keys = set(inspect.signature(UNet2DConditionModel.__init__).parameters) - {"self"}
    assert CARRIED | RULES.keys() == keys and not CARRIED & RULES.keys()
    assert RULES.keys() == REFUSED.keys(), "each rule has a value here that it refuses"


@pytest.mark.parametrize("key", REFUSED)
def test_a_config_that_is_not_carried_is_refused_by_key_and_value(
    key: str, base_pipeline_dir: Path, tmp_path: Path
) -> None:
    """From ``config.json`` alone, before weights are read or anything is written."""
    base = tmp_path / "base"
    shutil.copytree(base_pipeline_dir, base)
    path = base / "unet" / "config.json"
    config = json.loads(path.read_text()) | {key: REFUSED[key]}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"{path}: {key} is ") as error:
        upcycle_folder(base, tmp_path / "mtu", PAPER_TASKS, **SMALL)
    assert json.dumps(REFUSED[key]) in error.value.message and error.value.hint and error.value.exit_code == 5
    assert [one.name for one in tmp_path.iterdir()] == ["base"]


def test_a_key_of_a_newer_diffusers_is_refused_unless_it_has_its_default() -> None:
    def newer(sample_size: int = 8, window: int | None = None) -> None: ...

    parameters = inspect.signature(newer).parameters
    check_unet({"window": None, "not_of_diffusers": 1}, parameters=parameters)
    with pytest.raises(ModelError, match="window is 3"):
        check_unet({"window": 3}, parameters=parameters)


def test_labels_and_guidance_have_to_fit_the_unet() -> None:
    labelled, lcm = make({"num_class_embeds": 5}), make({"time_cond_proj_dim": 16})
    for label, shown in ((None, "null"), (5, "5")):
        with pytest.raises(ModelError, match=f"class_label {shown}") as error:
            upcycle_unet(labelled, [Task("t2i", class_label=label)], **SMALL)
        assert "a number from 0 to 4" in str(error.value.hint)
    with pytest.raises(ModelError, match="takes none"):
        upcycle_unet(make({}), [Task("t2i", class_label=1)], **SMALL)
    with pytest.raises(ModelError, match="guidance 'embedded'"):
        upcycle_unet(make({}), [Task("t2i", guidance="embedded")], **SMALL)
    tasks = upcycle_unet(lcm, PAPER_TASKS, **SMALL).tasks
    assert [task.guidance for task in tasks] == ["embedded", "embedded", "none", "embedded"]
    assert all(task.unet_batch == 1 for task in tasks)
    config = {**BASE, "time_cond_proj_dim": 16, "num_experts": 1, **SMALL}
    with pytest.raises(ModelError, match="time_cond_proj_dim is 16"):
        MTUUNet2DConditionModel(tasks=[Task("t2i").to_json()], **config)


@torch.no_grad()
def test_tasks_may_have_labels_of_their_own() -> None:
    plain = make({"num_class_embeds": 5})
    tasks = [Task("first", class_label=1), Task("second", class_label=4)]
    unet = upcycle_unet(plain, tasks, num_experts=2, **SMALL).eval()
    inputs = inputs_of(plain, None)
    expected = plain(**inputs, class_labels=torch.tensor([4, 1])).sample
    assert relative(unet(**inputs, task_ids=torch.tensor([1, 0])).sample, expected) < 1e-5
