"""Weights that are not numbers are found when the model is read, before anything is made of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.observe import observe
from calibration.samples import Sample
from mtu_compile.core.errors import EXIT_INPUT, ModelError
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.model.finite import check_weights, is_finite
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.model.upcycle import upcycle_folder


@pytest.fixture
def copied(mtu_pipeline_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mtu_pipeline_dir, tmp_path / "pipeline"))


def spoil(file: Path, value: float, dtype: torch.dtype = torch.float32) -> str:
    """Put ``value`` at the end of one tensor of a weight file, and return the tensor's name."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    name = sorted(tensors)[len(tensors) // 2]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    return name


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_spoilt_weight_is_named(copied: Path, component: str, value: float) -> None:
    file = next((copied / component).glob("*.safetensors"))
    name = spoil(file, value)
    with pytest.raises(ModelError) as caught:
        MTUPipeline.from_pretrained(copied)
    assert caught.value.exit_code == EXIT_INPUT
    assert str(file) in caught.value.message and repr(name) in caught.value.message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_read_too(copied: Path, dtype: torch.dtype) -> None:
    file = next((copied / "unet").glob("*.safetensors"))
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    MTUPipeline.from_pretrained(copied)
    name = spoil(file, np.nan, dtype)
    with pytest.raises(ModelError, match=r"1 NaN among"):
        MTUPipeline.from_pretrained(copied)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        check_weights(file)


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_upcycling_refuses_it_too(base_pipeline_dir: Path, tmp_path: Path, component: str) -> None:
    base = Path(shutil.copytree(base_pipeline_dir, tmp_path / "base"))
    spoil(next((base / component).glob("*.safetensors")), np.nan)
    with pytest.raises(ModelError, match="1 NaN"):
        upcycle_folder(base, tmp_path / "mtu", PAPER_TASKS, num_experts=2, d_task=16, router_width=16)
    assert not (tmp_path / "mtu").exists()


def test_every_kind_of_number_is_understood() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        tensor = torch.ones(9).to(dtype)
        assert is_finite(tensor)
        tensor[8] = np.nan
        assert not is_finite(tensor)
    assert is_finite(torch.arange(3)) and is_finite(torch.ones(0)) and is_finite(torch.tensor([True]))
    assert is_finite(torch.full((2,), torch.finfo(torch.float32).max))  # their sum would overflow


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("text_encoder.final_layer_norm.weight", "the text encoder"),
        ("unet.conv_out.weight", r"UNet of task 't2i', in step 1 of 2"),
        ("vae.decoder.conv_out.weight", "the VAE decoder"),
    ],
)
def test_a_float_original_that_overflows_is_no_reference(mtu_pipeline_dir: Path, part: str, named: str) -> None:
    """Finite weights, infinite outputs: not the precision's fault, nor the calibration's."""
    pipeline: Any = MTUPipeline.from_pretrained(mtu_pipeline_dir)
    names = dict(pipeline.unet.named_parameters(prefix="unet"))
    names |= dict(pipeline.vae.named_parameters(prefix="vae"))
    names |= dict(pipeline.text_encoder.named_parameters(prefix="text_encoder"))
    parameter = next(value for name, value in names.items() if name.endswith(part.split(".", 1)[1]))
    with torch.no_grad():
        parameter.fill_(3e38)
    with pytest.raises(ModelError, match=named):
        observe(pipeline, PAPER_TASKS[0], Sample("ab"), size=None, steps=2, seed=0)
