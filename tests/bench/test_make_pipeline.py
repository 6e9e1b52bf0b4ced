"""Pipeline folders of random weights: they have the published form, and the networks in them answer sensibly."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench.families import FAMILIES, Family
from bench.make_pipeline import _multi_task, _network, write_pipeline, write_tokenizer
from bench.random_weights import Weight, write_component
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.model.configs import check_configs
from mtu_compile.model.folder import check_folder, read_index
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.tokenizer import load_tokenizer
from mtu_compile.model.upcycle import upcycle_folder
from mtu_compile.runtime.text import Tokenizer


def small(family: Family) -> Family:
    """The same anatomy, a hundredth as wide."""
    levels = len(family.unet["block_out_channels"])
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    return replace(
        family,
        unet={
            **family.unet,
            "attention_head_dim": 2,
            "block_out_channels": [32, 64, 64, 64][:levels],
            "cross_attention_dim": 16 * len(family.text_encoders),
            "norm_num_groups": 4,
            "sample_size": 16,
            **({"transformer_layers_per_block": [1, 1, 2]} if levels == 3 else {}),
        },
        vae={**family.vae, "block_out_channels": [16, 32, 32, 32], "norm_num_groups": 4},
        text_encoders={
            name: replace(one, config={**one.config, **widths, "vocab_size": 2000})
            for name, one in family.text_encoders.items()
        },
    )


@pytest.mark.parametrize("form", [{}, {"variant": "fp16"}, {"variant": "fp16", "shard_bytes": 800_000}], ids=str)
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_a_pipeline_of_any_form_denoises(name: str, form: dict[str, object], tmp_path: Path) -> None:
    family = small(FAMILIES[name])
    write_pipeline(family, tmp_path / "model", picture=64, **form)  # type: ignore[arg-type]
    unet = sorted(path.name for path in (tmp_path / "model" / "unet").iterdir())
    assert any("00001-of-" in one for one in unet) == ("shard_bytes" in form)
    assert all(("fp16" in one) == ("variant" in form) for one in unet if one != "config.json")
    pipeline = MTUPipeline.from_pretrained(tmp_path / "model")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    result = pipeline(
        "a cat",
        task="t2i",
        num_inference_steps=4,
        seed=0,
        output_type="np",
        on_unet_call=lambda inputs, output, _: seen.append((inputs["sample"], output)),
    )
    for sample, output in seen:
        assert 0.2 < output.std() < 5
        assert np.corrcoef(sample[:, :4].flatten(), output.flatten())[0, 1] > 0.5, "no denoiser"
    assert not torch.equal(seen[0][1][0], seen[0][1][1]), "the prompt changes nothing"
    assert np.isfinite(result.images).all() and 0.05 < result.images.std() < 0.5


def test_tasks_differ(tmp_path: Path) -> None:
    write_pipeline(small(FAMILIES["sd15"]), tmp_path / "model", picture=64)
    unet = MTUPipeline.from_pretrained(tmp_path / "model").unet
    numbers = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 9, 16, 16, generator=numbers), torch.randn(1, 77, 16, generator=numbers)
    with torch.no_grad():
        made = [unet(sample, 500, text, torch.tensor([task])).sample for task in range(len(PAPER_TASKS))]
    for one in made[1:]:
        assert (one - made[0]).std() > 1e-3


def test_sdxl_has_the_published_form(tmp_path: Path) -> None:
    write_pipeline(small(FAMILIES["sdxl"]), tmp_path / "model", variant="fp16", picture=64)
    assert {"text_encoder_2", "tokenizer_2"} <= check_folder(tmp_path / "model").keys()
    weights = load_file(tmp_path / "model" / "text_encoder_2" / "model.fp16.safetensors")
    assert "text_projection.weight" in weights and not any("position_ids" in name for name in weights)
    assert "decoder.mid_block.attentions.0.to_q.weight" in load_file(
        tmp_path / "model" / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )


def test_a_plain_pipeline_upcycles(tmp_path: Path) -> None:
    write_pipeline(small(FAMILIES["sd15"]), tmp_path / "plain", plain=True)
    index = json.loads((tmp_path / "plain" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert (tmp_path / "plain" / "safety_checker" / "config.json").is_file()
    upcycle_folder(tmp_path / "plain", tmp_path / "mtu", PAPER_TASKS, num_experts=2, d_task=8, router_width=8)
    assert check_folder(tmp_path / "mtu")


@pytest.mark.parametrize(
    ("name", "unet", "vae", "text"),
    [
        # Published counts; the UNets' are 859.5, 865.9 and 2567.5 before upcycling.
        ("sd15", 859.5, 83.65, [123.06]),
        ("sd21", 865.9, 83.65, [340.4]),
        ("sdxl", 2567.5, 83.65, [123.06, 694.7]),
    ],
)
def test_full_size(name: str, unet: float, vae: float, text: list[float], tmp_path: Path) -> None:
    family = FAMILIES[name]

    def millions(network: nn.Module) -> float:
        return sum(one.numel() for one in network.parameters()) / 1e6

    assert millions(_network("UNet2DConditionModel", family.unet)) == pytest.approx(unet, abs=0.1)
    multi = millions(_network("MTUUNet2DConditionModel", {**family.unet, **_multi_task(family)}))
    assert unet < multi < 1.03 * unet
    assert millions(_network("AutoencoderKL", family.vae)) == pytest.approx(vae, abs=0.01)
    found = [millions(_network(one.kind, one.config)) for one in family.text_encoders.values()]
    assert found == pytest.approx(text, abs=0.1)
    # The configs pass the checks that published ones pass.
    write_pipeline(small(family), tmp_path / "model", picture=64)
    for part, config in {"unet": {**family.unet, **_multi_task(family)}, "vae": family.vae}.items():
        (tmp_path / "model" / part / "config.json").write_text(json.dumps(config))
    for encoder, one in family.text_encoders.items():
        (tmp_path / "model" / encoder / "config.json").write_text(json.dumps(one.config))
    check_configs(tmp_path / "model", read_index(tmp_path / "model"))


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_the_tokenizer_is_of_clips_size(pad: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", pad, 49408, 77)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    assert tokenizer.pad_token == pad and tokenizer.eos_token_id == 49407
    tokenizer.save_pretrained(tmp_path / "bundle")
    (ids,) = Tokenizer(tmp_path / "bundle" / "tokenizer.json", 77, tokenizer.pad_token_id)(["a red bicycle"])
    expected = tokenizer("a red bicycle", padding="max_length", max_length=77).input_ids
    assert list(ids) == expected and 4 < len(set(expected)) < 15


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    side = 1000

    def drawn() -> torch.Tensor:
        return torch.from_numpy(np.ones((side, side), np.float32))  # numpy, so that tracemalloc sees it

    tensors = [Weight(f"weight {number}", (side, side), torch.float32, drawn) for number in range(12)]
    tracemalloc.start()
    write_component(tmp_path, "model", tensors, shard_bytes=5 * 4 * side**2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * 4 * side**2
    assert len(list(tmp_path.glob("model-0000?-of-00003.safetensors"))) == 3
    assert load_file(tmp_path / "model-00003-of-00003.safetensors")["weight 11"].sum() == side**2
