"""Models whose numbers float32 holds and float16 does not, built for devices that compute in float16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("target", ["intel-gpu", pytest.param("jetson-orin", marks=pytest.mark.heavy)])
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
