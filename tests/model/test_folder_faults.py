"""Values of the wrong kind anywhere in a model folder: refused at once, naming file, key and what was expected."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mtu_compile.cli import build, calibrate, plan, train, upcycle
from mtu_compile.core.errors import MtuError

UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
TOKENIZER, INDEX = "tokenizer/tokenizer_config.json", "model_index.json"
SHARDS = "unet/diffusion_pytorch_model.safetensors.index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def put(*path: str | int, to: Any) -> Callable[[Any], Any]:
    """Set what lies at ``path`` in a JSON file."""

    def change(data: Any) -> Any:
        place = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        return data

    return change


def drop(key: str) -> Callable[[Any], Any]:
    return lambda data: {name: value for name, value in data.items() if name != key}


def write(text: str) -> Callable[[Any], Any]:
    """Replace the whole file."""
    return lambda data: text


FAULTS: list[tuple[str, Callable[[Any], Any] | None, str]] = [
    # the multi-task part
    (UNET, put("num_experts", to=0), "num_experts is 0, expected a whole number from 1 to 256"),
    (UNET, put("num_experts", to="4"), 'num_experts is "4"'),
    (UNET, put("num_experts", to=3), "3 experts do not divide"),
    (UNET, put("num_experts", to=2), "is not in it|expected"),
    (UNET, put("d_task", to=-1), "d_task is -1"),
    (UNET, put("router_width", to=[16]), r"router_width is \[16\]"),
    (UNET, put("norm_per_expert", to="no"), 'norm_per_expert is "no", expected true or false'),
    (UNET, put("top_k", to=[1]), r"top_k is \[1\], expected for each of 4 tasks"),
    (UNET, put("top_k", to=[5, 1, 1, 1]), "top_k is .* from 1 to 4"),
    (UNET, put("tasks", to=[]), r"tasks is \[\]"),
    (UNET, put("tasks", to={"t2i": {}}), "tasks is .*, expected 1 to 64 entries: a list of tasks"),
    (UNET, drop("tasks"), "tasks is missing"),
    (UNET, put("tasks", 2, "downscale", to=0), r"tasks\[2\].downscale is 0, expected a whole number from 1 to 64"),
    (UNET, put("tasks", 2, "downscale", to="4"), r'tasks\[2\].downscale is "4"'),
    (UNET, put("tasks", 0, "guidance_scale", to="7.5"), r'tasks\[0\].guidance_scale is "7.5", expected a number'),
    (UNET, put("tasks", 2, "guidance_scale", to="7.5"), r'tasks\[2\].guidance_scale is "7.5"'),  # not guided
    (UNET, put("tasks", 0, "guidance_scale", to=1e300), r"tasks\[0\].guidance_scale is 1e\+300"),
    (UNET, put("tasks", 0, "guidance_scale", to=math.nan), "NaN is no number"),
    (UNET, put("tasks", 0, "name", to="a" * 250), r"tasks\[0\].name is .* 64 bytes"),
    (UNET, put("tasks", 0, "name", to="a" * 300), r"tasks\[0\].name is .* 64 bytes"),
    (UNET, put("tasks", 0, "name", to="edit"), "a name each of their own"),
    (UNET, put("tasks", 0, "colour", to=1), r"tasks\[0\].colour is 1, expected no such key"),
    # what diffusers read
    (UNET, put("block_out_channels", to="64"), 'block_out_channels is "64", expected .*list'),
    (UNET, put("block_out_channels", to=[0, 64]), r"block_out_channels\[0\] is 0"),
    (UNET, put("block_out_channels", to=[32, 128]), r"weight .* is \[.*\] in diffusion_pytorch_model.safetensors"),
    (UNET, put("attention_head_dim", to=0), "attention_head_dim is 0"),
    (UNET, put("sample_size", to="8"), 'sample_size is "8"'),
    (UNET, put("layers_per_block", to=10**6), "layers_per_block is 1000000, expected a whole number from 1 to 64"),
    (UNET, put("norm_num_groups", to=7), "no MTUUNet2DConditionModel can be made of it"),
    (UNET, put("down_block_types", to=["DownBlock2D", 1]), r"down_block_types\[1\] is 1, expected text"),
    (UNET, put("act_fn", to=None), "act_fn is null"),
    (UNET, put("use_linear_projection", to="yes"), 'use_linear_projection is "yes"'),
    (UNET, put("cross_attention_dim", to=48), "cross_attention_dim is 48, expected 32, the text encoder's hidden_size"),
    (UNET, put("_class_name", to="UNet3DConditionModel"), '_class_name is "UNet3DConditionModel"'),
    (UNET, put("quantization_config", to={"quant_method": "bitsandbytes"}), "quantization_config is"),
    (UNET, write("[]"), r"is \[\], expected an object"),
    (UNET, write("[" * 100_000), "more than 64 levels"),
    (UNET, write('{"a":' * 300 + "1" + "}" * 300), "more than 64 levels"),
    (UNET, None, "is missing"),
    (VAE, put("scaling_factor", to=0), "scaling_factor is 0, expected a number above 0"),
    (VAE, put("scaling_factor", to="0.18"), 'scaling_factor is "0.18"'),
    (VAE, put("scaling_factor", to=-math.inf), "-Infinity is no number"),
    (VAE, put("scaling_factor", to=None), "scaling_factor is null"),
    (VAE, put("latent_channels", to=8), "latent_channels is 8, expected 4, the UNet's out_channels"),
    (VAE, put("in_channels", to=4), "in_channels is 4, expected 3"),
    (VAE, put("latents_mean", to=[0.1]), r"latents_mean is \[0.1\], expected 4 numbers"),
    (VAE, put("latents_mean", to=[0, 0, 0, 1]), "latents_std is null, expected 4 numbers beside latents_mean"),
    (VAE, put("latents_std", to=[1, 1, 1, 0]), r"latents_std\[3\] is 0, expected a number above 0"),
    (VAE, put("block_out_channels", to=[16, 16]), "down_block_types is .*, expected 2 entries"),
    (VAE, put("up_block_types", to=["UpBlock9D"] * 3), "no AutoencoderKL can be made of it"),
    # what transformers read
    (TEXT, put("use_attention_mask", to=True), "use_attention_mask is true, expected false"),
    (TEXT, put("hidden_act", to="swoosh"), 'hidden_act is "swoosh", expected an activation'),
    (TEXT, put("hidden_size", to="32"), 'hidden_size is "32"'),
    (TEXT, put("num_attention_heads", to=0), "num_attention_heads is 0"),
    (TEXT, put("num_attention_heads", to=5), "no CLIPTextModel can be made of it"),
    (TEXT, put("num_hidden_layers", to=3), "not in it"),
    (TEXT, put("model_type", to="t5"), 'model_type is "t5"'),
    (TEXT, put("quantization_config", to={"quant_method": "awq"}), "quantization_config is"),
    (TOKENIZER, None, "is missing"),
    (TOKENIZER, write("[]"), "expected an object"),
    (TOKENIZER, drop("model_max_length"), "model_max_length is missing, expected a whole number from 2 to 16"),
    (TOKENIZER, put("model_max_length", to=1e30), "model_max_length is 1e\\+30"),
    (
        TOKENIZER,
        put("model_max_length", to=int(1e30)),
        "model_max_length is 1000.*, expected a whole number from 2 to 16",
    ),
    (TOKENIZER, put("model_max_length", to=17), "model_max_length is 17"),
    (TOKENIZER, put("model_max_length", to="16"), 'model_max_length is "16"'),
    (TOKENIZER, put("padding_side", to="left"), 'padding_side is "left", expected "right"'),
    (TOKENIZER, put("truncation_side", to="left"), 'truncation_side is "left"'),
    (TOKENIZER, put("split_special_tokens", to=True), "split_special_tokens is true"),
    (TOKENIZER, put("tokenizer_class", to="BertTokenizer"), 'tokenizer_class is "BertTokenizer"'),
    ("tokenizer/tokenizer.json", None, "vocab.json is missing, and so is tokenizer.json"),
    ("tokenizer/tokenizer.json", write("{}"), "tokenizer is not a tokenizer"),
    ("tokenizer/tokenizer.json", put("model", "vocab", to={"<|startoftext|>": 52, "<|endoftext|>": 54}), "numbered 54"),
    # indices
    (SHARDS, write("[]"), r"is \[\], expected an object"),
    (SHARDS, write('{"weight_map": []}'), r"weight_map is \[\], expected"),
    (SHARDS, write('{"weight_map": {"a": 3}}'), "weight_map.a is 3, expected the name of a safetensors file"),
    (SHARDS, write('{"weight_map": {"a": "../x.safetensors"}}'), "weight_map.a is .*not outside its folder"),
    (SHARDS, write('{"weight_map": {"a": "gone.safetensors"}}'), "gone.safetensors is missing"),
    (SHARDS, write(json.dumps({"weight_map": {"a": WEIGHTS}})), 'weight_map says "a" is in'),
    (SHARDS, write(json.dumps({"weight_map": {"conv_out.bias": WEIGHTS}})), "not in it"),
    (SHARDS, write('{"weight_map": NaN}'), "NaN is no number"),
    (
        INDEX,
        put("unet", to="MTUUNet2DConditionModel"),
        'unet is "MTUUNet2DConditionModel", expected a list of 2 values',
    ),
    (INDEX, put("vae", to=["diffusers", 3]), r"vae\[1\] is 3"),
    (INDEX, put("controlnet", to=["diffusers", "ControlNetModel"]), "controlnet, a diffusers.ControlNetModel"),
    (INDEX, drop("vae"), "does not list vae"),
    (INDEX, write("[]"), "expected an object"),
    (INDEX, write('{"unet": '), "is not JSON"),
    ("scheduler/scheduler_config.json", write("["), "is not JSON"),
]


@pytest.fixture(scope="module")
def model(mtu_pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to be harmed; each test mends it again."""
    folder = tmp_path_factory.mktemp("faulty") / "mtu"
    shutil.copytree(mtu_pipeline_dir, folder)
    return folder


def refused(command: Any, *arguments: object) -> MtuError:
    """What a command says to bad input: the error that ends it with exit code 5."""
    result = CliRunner().invoke(command, [str(one) for one in arguments])
    assert isinstance(result.exception, MtuError), repr(result.exception) + result.output
    assert result.exception.exit_code == 5 and result.exception.hint
    return result.exception


@pytest.mark.parametrize(
    ("file", "change", "named"), FAULTS, ids=[f"{Path(file).parent}-{i}" for i, (file, _, _) in enumerate(FAULTS)]
)
def test_a_fault_is_named(
    model: Path, tmp_path: Path, file: str, change: Callable[[Any], Any] | None, named: str
) -> None:
    path = model / file
    before = path.read_bytes() if path.exists() else None
    try:
        if change is None:
            path.unlink()
        else:
            after = change(json.loads(before) if before else None)
            path.write_text(after if isinstance(after, str) else json.dumps(after))
        error = refused(build.command, model, "--fp32", "-o", tmp_path / "bundle", "-q")
        assert re.search(named, error.message)
        assert path.parent.name in error.message or path.name in error.message
        assert len(error.message) < 500 + len(str(path)) and "\n" not in error.message
        assert not list(tmp_path.iterdir())
    finally:
        if before is None:
            path.unlink()
        else:
            path.write_bytes(before)


def test_every_command_that_reads_a_model_checks_it(model: Path, data_dir: Path, tmp_path: Path) -> None:
    path = model / TOKENIZER
    kept = path.read_bytes()
    path.unlink()
    out = tmp_path / "out"
    try:
        for command, arguments in {
            build: ("-o", out, "-q"),
            plan: (),
            calibrate: ("--data", data_dir, "-o", out, "-q"),
            train: ("--data", data_dir, "-o", out, "--cpu", "-q"),
            upcycle: ("-o", out, "-q"),
        }.items():
            assert "tokenizer_config.json is missing" in refused(command.command, model, *arguments).message
    finally:
        path.write_bytes(kept)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"name": "x"}', "is {.*, expected 1 to 64 entries: a list of tasks"),
        ("[]", "expected 1 to 64 entries"),
        ('[{"name": "x", "downscale": 0}]', r"\[0\].downscale is 0"),
        (
            '[{"name": "x"}, {"name": "y", "guidance": "none", "guidance_scale": "7.5"}]',
            r'\[1\].guidance_scale is "7.5"',
        ),
        ('[{"name": "%s"}]' % ("n" * 300), r"\[0\].name is"),
        ("[" * 100_000, "more than 64 levels"),
        ('[{"name": "x", "guidance_scale": Infinity}]', "Infinity is no number"),
    ],
)
def test_a_bad_tasks_file_is_named(base_pipeline_dir: Path, tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(text)
    error = refused(upcycle.command, base_pipeline_dir, "-o", tmp_path / "mtu", "--tasks", path)
    assert re.search(named, error.message)
    assert str(path) in error.message
