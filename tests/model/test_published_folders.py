"""Pipeline folders as they are published: fp16 alone, in shards, with pickles, filters and old names beside."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mtu_compile.core.hashing import model_files
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.model import encode
from mtu_compile.model.autoencoder import fold_statistics
from mtu_compile.model.folder import check_folder, load_component
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.upcycle import upcycle_folder
from mtu_compile.model.weights import find_weights
from mtu_compile.runtime.text import Tokenizer
from tests.slow_tokenizer import write_slow_tokenizer

SMALL = {"num_experts": 2, "d_task": 8, "router_width": 8}
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
SHARD = {"unet": "900KB", "vae": "100KB", "text_encoder": "40KB"}


@pytest.fixture
def base(base_pipeline_dir: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(base_pipeline_dir, tmp_path / "base"))


def only_fp16(folder: Path, name: str) -> None:
    model = CLASSES[name].from_pretrained(folder / name)
    for path in (folder / name).glob("*.safetensors"):
        path.unlink()
    torch.nn.Module.to(model, torch.float16).save_pretrained(folder / name, variant="fp16")


def shards(folder: Path, name: str) -> None:
    model = CLASSES[name].from_pretrained(folder / name)
    for path in (folder / name).glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(folder / name, max_shard_size=SHARD[name])


def fp16_shards(folder: Path, name: str) -> None:
    """``STEM.fp16-00001-of-00002.safetensors``"""
    model = CLASSES[name].from_pretrained(folder / name)
    for path in (folder / name).glob("*.safetensors"):
        path.unlink()
    torch.nn.Module.to(model, torch.float16).save_pretrained(folder / name, variant="fp16", max_shard_size="30KB")


def fp16_shards_the_other_way(folder: Path, name: str) -> None:
    """``STEM-00001-of-00002.fp16.safetensors``"""
    fp16_shards(folder, name)
    (index,) = (folder / name).glob("*.safetensors.index.fp16.json")
    text = re.sub(r"\.fp16-(\d+-of-\d+)\.safetensors", r"-\1.fp16.safetensors", index.read_text())
    index.write_text(text)
    for path in (folder / name).glob("*.fp16-*.safetensors"):
        path.rename(path.with_name(re.sub(r"\.fp16-(\d+-of-\d+)", r"-\1.fp16", path.name)))


@pytest.mark.parametrize("form", [only_fp16, shards, fp16_shards, fp16_shards_the_other_way])
@torch.no_grad()
def test_weights_load_in_every_form(base: Path, tmp_path: Path, form: Callable[[Path, str], None]) -> None:
    before = {name: CLASSES[name].from_pretrained(base / name).state_dict() for name in CLASSES}
    for name in CLASSES:
        form(base, name)
        weights = find_weights(base / name, "model" if name == "text_encoder" else "diffusion_pytorch_model")
        assert weights.variant == ("fp16" if "fp16" in form.__name__ else None)
        assert (weights.index is not None) == ("shards" in form.__name__)
        assert not weights.index or len(weights.files) > 1
    upcycle_folder(base, tmp_path / "mtu", PAPER_TASKS[:1], **SMALL)
    pipeline = MTUPipeline.from_pretrained(tmp_path / "mtu")
    for name in ("vae", "text_encoder"):
        for key, value in getattr(pipeline, name).state_dict().items():
            assert torch.allclose(value, before[name][key], rtol=1e-3, atol=1e-4), key
    kept = pipeline.unet.state_dict()
    assert all(torch.allclose(kept[key], before["unet"][key], rtol=1e-3, atol=1e-4) for key in kept if "attn" in key)
    picture = pipeline("a", task="t2i", num_inference_steps=1, seed=0, output_type="np").images
    assert picture.shape == (1, 32, 32, 3) and np.isfinite(picture).all() and picture.std() > 0


def test_the_first_of_several_precisions_is_read_and_copied_alone(base: Path, tmp_path: Path) -> None:
    vae = base / "vae"
    plain = load_file(vae / "diffusion_pytorch_model.safetensors")
    other = {key: torch.full_like(value, 7.0).half() for key, value in plain.items()}
    for variant in ("fp16", "non_ema"):
        save_file(other, vae / f"diffusion_pytorch_model.{variant}.safetensors", {"format": "pt"})
    upcycle_folder(base, tmp_path / "mtu", PAPER_TASKS[:1], **SMALL)
    assert sorted(path.name for path in (tmp_path / "mtu" / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    read = load_component(AutoencoderKL, vae, dtype=torch.float32).state_dict()
    assert all(torch.equal(read[key], plain[key]) for key in plain)


class Bomb:
    """A pickle that shows when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickles_and_filters_lie_beside_and_are_never_opened(base: Path, tmp_path: Path) -> None:
    """As Stable Diffusion 1.5 ships: a safety checker and a feature extractor in the index, ``.bin`` files beside."""
    trace = tmp_path / "opened"
    index = json.loads((base / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "requires_safety_checker": True,
    }
    (base / "model_index.json").write_text(json.dumps(index))
    (base / "safety_checker").mkdir()
    (base / "safety_checker" / "config.json").write_text("not even JSON")
    for place in ("safety_checker", "unet", "vae", "text_encoder"):
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.ckpt"):
            torch.save(Bomb(trace), base / place / name)
    upcycle_folder(base, tmp_path / "mtu", PAPER_TASKS[:1], **SMALL)
    MTUPipeline.from_pretrained(tmp_path / "mtu")
    assert not trace.exists()
    assert not [path for path in (tmp_path / "mtu").rglob("*") if path.suffix in (".bin", ".ckpt")]
    written = json.loads((tmp_path / "mtu" / "model_index.json").read_text())
    assert not {"safety_checker", "feature_extractor", "image_encoder"} & written.keys()
    assert not any(name.startswith("safety_checker") for name in model_files(base))
    with pytest.raises(Exception, match=r".*"):  # the trap works
        torch.load(base / "unet" / "model.ckpt", weights_only=True)
    torch.load(base / "unet" / "model.ckpt", weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("pad", ["<|endoftext|>", "z"], ids=["1.x", "2.x, whose padding is a word"])
def test_a_slow_tokenizer(base: Path, tmp_path: Path, pad: str) -> None:
    expected = CLIPTokenizer.from_pretrained(base / "tokenizer")("a cat<|ENDoftext|> b").input_ids
    write_slow_tokenizer(base / "tokenizer", pad)
    upcycle_folder(base, tmp_path / "mtu", PAPER_TASKS[:1], **SMALL)
    tokenizer = MTUPipeline.from_pretrained(tmp_path / "mtu").tokenizer
    assert tokenizer.pad_token == pad and tokenizer.model_max_length == 16
    number = tokenizer.convert_tokens_to_ids(pad)
    tokenizer.save_pretrained(tmp_path / "bundle")
    (ids,) = Tokenizer(tmp_path / "bundle" / "tokenizer.json", 16, tokenizer.pad_token_id)(["a cat"])
    assert list(ids[:6]) == [*expected[:5], tokenizer.eos_token_id] and list(ids[6:]) == [number] * 10


@torch.no_grad()
def test_a_text_encoder_of_one_layer_less_than_its_weights(base: Path) -> None:
    """Stable Diffusion 2 reads the last layer but one; names have the prefix of transformers before 5."""
    folder = base / "text_encoder"
    path = folder / "model.safetensors"
    whole = CLIPTextModel.from_pretrained(folder)
    tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(path).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "hidden_act": "gelu", "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    check_folder(base)
    read = load_component(CLIPTextModel, folder, dtype=torch.float32)
    expected = CLIPTextModel(CLIPTextConfig(**{**whole.config.to_dict(), **config})).eval()
    expected.load_state_dict(whole.state_dict(), strict=False)
    ids = torch.randint(0, 52, (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(ids).last_hidden_state, expected(ids).last_hidden_state)
    assert not torch.allclose(read(ids).last_hidden_state, whole(ids).last_hidden_state, atol=1e-2)


def test_attention_of_autoencoders_has_old_names(base: Path) -> None:
    """As in Stable Diffusion 1.x's files: ``query``, and not ``to_q``."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16,) * 3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
    )
    shutil.rmtree(base / "vae")
    vae.save_pretrained(base / "vae")
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, value in load_file(path).items():
        for new, name in names.items():
            key = key.replace(f".{new}.", f".{name}.")
        old[key] = value
    assert any("query" in key for key in old)
    save_file(old, path, {"format": "pt"})
    check_folder(base)
    read = load_component(AutoencoderKL, base / "vae", dtype=torch.float32).state_dict()
    assert all(torch.equal(read[key], value) for key, value in vae.state_dict().items())


STATISTICS: list[dict[str, Any]] = [
    {"shift_factor": 0.0609, "scaling_factor": 1.5305},
    {"latents_mean": [-1.6, 1.1, 0.2, -0.4], "latents_std": [8.4, 5.9, 4.8, 0.5], "scaling_factor": 0.5},
]


@pytest.mark.parametrize("statistics", STATISTICS, ids=["shift", "mean and deviation"])
@pytest.mark.parametrize("convolutions", [True, False], ids=["with 1×1", "without 1×1"])
@torch.no_grad()
def test_statistics_of_a_latent_are_folded(base: Path, statistics: dict[str, Any], convolutions: bool) -> None:
    """What diffusers do with ``shift_factor`` (Stable Diffusion 3) and ``latents_mean`` (SDXL), left to the network."""
    torch.manual_seed(1)
    config = json.loads((base / "vae" / "config.json").read_text())
    config |= {**statistics, "use_quant_conv": convolutions, "use_post_quant_conv": convolutions, "force_upcast": True}
    shutil.rmtree(base / "vae")
    plain = AutoencoderKL.from_config(config).eval()
    plain.save_pretrained(base / "vae")
    check_folder(base)
    folded = fold_statistics(load_component(AutoencoderKL, base / "vae", dtype=torch.float32))
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    z = plain.encode(pixels).latent_dist
    mean = torch.tensor(statistics.get("latents_mean") or [statistics.get("shift_factor", 0.0)] * 4).view(1, 4, 1, 1)
    std = torch.tensor(statistics.get("latents_std") or [1.0] * 4).view(1, 4, 1, 1)
    scale = statistics["scaling_factor"]
    expected = (z.mode() - mean) * scale / std
    assert torch.allclose(encode.encode_pixels(folded, pixels), expected, atol=1e-5)
    assert not torch.allclose(encode.encode_pixels(plain, pixels), expected, atol=1e-2)
    assert torch.allclose(folded.encode(pixels).latent_dist.std, z.std / std, atol=1e-5)
    back = folded.decode(expected / scale).sample
    assert torch.allclose(back, plain.decode(expected * std / scale + mean).sample, atol=1e-5)
    assert folded.config.shift_factor is None and folded.config.latents_mean is None
    folded.save_pretrained(base / "vae")
    again = fold_statistics(load_component(AutoencoderKL, base / "vae", dtype=torch.float32))
    assert torch.equal(again.decode(expected / scale).sample, back)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet", {"upcast_attention": None, "num_class_embeds": None, "mid_block_only_cross_attention": None}),
        ("vae", {"force_upcast": True, "scaling_factor": 0.13025, "sample_size": 1024, "latents_mean": None}),
        ("text_encoder", {"torch_dtype": "float16", "dropout": 0.0, "attention_dropout": 0, "eos_token_id": 2}),
        ("text_encoder", {"use_attention_mask": False, "projection_dim": 512, "_name_or_path": "x"}),
    ],
)
def test_what_published_configs_say_is_taken(base: Path, file: str, change: dict[str, Any]) -> None:
    path = base / file / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    before = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    check_folder(base)
    assert {file: file.read_bytes() for file in base.rglob("*") if file.is_file()} == before
