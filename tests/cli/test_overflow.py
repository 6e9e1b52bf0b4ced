"""Models whose numbers float32 holds and float16 does not, built for devices that compute in float16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from tests.cli.test_sdxl import write_rows

Run = Callable[..., Any]

OPTIONS = ("--task", "t2i", "--steps", 3, "--check-pictures", 1, "--calibration-pictures", 1, "--no-wheels", "-q")


def enlarged(model: Path, out: Path, component: str, part: str, factor: float) -> Path:
    """A copy of ``model`` in which the first weight whose name ends in ``part`` is ``factor`` times as large."""
    shutil.copytree(model, out)
    file = next((out / component).glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.endswith(part))
    tensors[name] *= factor
    save_file(tensors, file)
    return out


@pytest.fixture(scope="session")
def overflowing_sdxl(sdxl_pipeline_dir: Path, made_once: Any) -> Path:
    """SDXL whose decoder's numbers grow to 1e6 inside, and end where they did: half precision makes NaN of them."""

    def make(folder: Path) -> None:
        enlarged(sdxl_pipeline_dir, folder / "model", "vae", "decoder.conv_in.weight", 1e7)

    return made_once("sdxl-overflow", make) / "model"


@pytest.mark.slow
def test_sdxls_decoder_overflows_in_float16_and_is_built_in_float32(
    overflowing_sdxl: Path, tmp_path: Path, mtu: Run
) -> None:
    vae = AutoencoderKL.from_pretrained(overflowing_sdxl / "vae")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert vae.decode(latents).sample.isfinite().all()
        assert not vae.to(torch.float16).decode(latents.half()).sample.isfinite().all()
    write_rows(tmp_path / "rows")
    data = ("--as-task", "t2i", "--data", tmp_path / "rows", "--target", "intel-gpu", "--fp16")
    options = [one for one in OPTIONS if one not in ("--task", "t2i")]
    done = mtu("build", overflowing_sdxl, *data, "-o", tmp_path / "bundle", *options)
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["vae_decoder"]["config"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert manifest["text_2"]["engine"]["config"]["INFERENCE_PRECISION_HINT"] == "f16"
    found = manifest["provenance"]["float16_range"]["vae_decoder"]
    assert found["precision"] == "fp32" and found["peak"] > 65504 and found["overflow"].startswith("decoder.")
    # checked with every other number rounded to float16, its pictures are those of the original
    assert manifest["tasks"]["t2i"]["accuracy"]["passed"] is True


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("intel-gpu", marks=pytest.mark.heavy),
        pytest.param("jetson-orin", marks=pytest.mark.slow),
    ],
)
def test_a_unet_that_overflows_is_refused_by_its_first_node(
    tiny_model: Path, tmp_path: Path, mtu: Run, target: str
) -> None:
    model = enlarged(tiny_model, tmp_path / "model", "unet", "experts.0.net.2.weight", 1e6)
    done = mtu("build", model, "--target", target, "--fp16", "-o", tmp_path / "bundle", *OPTIONS)
    assert done.code == 3, done.err
    assert "the UNet of task 't2i' overflows float16 in step 1 of 3" in done.err
    assert "first at node 'down_blocks.0.attentions.0.transformer_blocks.0.ff" in done.err
    assert "hint: build with --fp32" in done.err and "calibrat" not in done.err
    assert not (tmp_path / "bundle").exists()


def test_a_decoder_that_overflows_stays_float32(tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    """Its numbers grow to 1e6 and are made small again by the last layer, so the pictures are those they were."""
    model = enlarged(tiny_model, tmp_path / "model", "vae", "decoder.conv_in.weight", 1e7)
    done = mtu("build", model, "--target", "intel-gpu", "--fp16", "-o", tmp_path / "bundle", *OPTIONS)
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["vae_decoder"]["config"]["INFERENCE_PRECISION_HINT"] == "f32"
    assert manifest["text"]["engine"]["config"]["INFERENCE_PRECISION_HINT"] == "f16"
    found = manifest["provenance"]["float16_range"]
    assert found["vae_decoder"]["precision"] == "fp32" and found["vae_decoder"]["peak"] > 65504
    assert found["text_encoder"]["precision"] == "fp16" and found["text_encoder"]["overflow"] is None
    assert "rounding to float16" in manifest["tasks"]["t2i"]["accuracy"]["measured_with"]
