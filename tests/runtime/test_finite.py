"""NaN and Inf never become a picture, whichever network gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mtu_compile import bundle
from mtu_compile.bundle import EngineRef
from mtu_compile.core.errors import EXIT_ACCURACY, AccuracyError, BundleError, NotFiniteError
from mtu_compile.runtime import Runtime, images
from mtu_compile.runtime.engine import Engine, open_engine
from mtu_compile.runtime.finite import advice
from mtu_compile.runtime.reference import Reference, Trajectory

PICTURE = Image.new("RGB", (32, 32), "red")


class Spoilt:
    """An engine of which the last number of every sample is not one."""

    def __init__(self, engine: Engine, value: float) -> None:
        self._engine, self._value = engine, value
        self.inputs, self.outputs, self.close = engine.inputs, engine.outputs, engine.close

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        outputs = self._engine(inputs)
        for output in outputs.values():
            output.reshape(len(output), -1)[:, -1] = self._value
        return outputs


def spoilt(root: Path, folder: str, value: float = np.nan, **changed: Any) -> Runtime:
    """The bundle with the network in ``folder`` spoilt."""

    def opener(ref: EngineRef) -> Engine:
        engine = open_engine(ref.kind, root / ref.path, ref.config)
        return Spoilt(engine, value) if ref.path.startswith(f"{folder}/") else engine

    return Runtime(root, replace(bundle.read(root, verify=False), **changed), opener)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("network", ["text_encoder", "vae_encoder", "vae_decoder"])
def test_every_network_is_looked_at(tiny_bundle: Any, network: str, value: float) -> None:
    with (
        spoilt(tiny_bundle[0], network, value) as loaded,
        pytest.raises(NotFiniteError, match=network.split("_")[1]) as caught,
    ):
        loaded.run("edit", "a", image=PICTURE, steps=1)
    assert caught.value.network == network and caught.value.step is None
    assert caught.value.exit_code == EXIT_ACCURACY


def test_the_unet_says_its_task_and_step(tiny_bundle: Any) -> None:
    with spoilt(tiny_bundle[0], "unet_sr") as loaded, pytest.raises(NotFiniteError, match=r"step 1 of 2") as caught:
        loaded.run("sr", image=PICTURE, steps=2)
    assert (caught.value.network, caught.value.task, caught.value.step) == ("unet", "sr", 1)


def test_advice_fits_the_precision(tiny_bundle: Any) -> None:
    manifest = bundle.read(tiny_bundle[0], verify=False)

    def said(precision: str, kind: str = "tensorrt", **config: str) -> str:
        return advice(replace(manifest, precision=precision), EngineRef(kind, "unet/model.onnx", config))

    for precision in ("fp16", "int8", "fp8", "int4-weights"):
        assert "--bf16" in said(precision) and "calibrat" not in said(precision)
    for text in (said("fp32"), said("bf16"), said("int8", "openvino", INFERENCE_PRECISION_HINT="bf16")):
        assert "--bf16" not in text and "wider type does not help" in text


def test_a_picture_of_nan_is_refused() -> None:
    pixels = np.zeros((1, 3, 16, 16), np.float32)
    images.to_picture(pixels)
    pixels[0, 1, 2, 3] = np.nan
    with pytest.raises(AccuracyError, match="NaN or Inf"):
        images.to_picture(pixels)


@pytest.mark.parametrize("spoil", ["outputs", "latents", "noise", "inputs"])
def test_a_reference_with_nan_is_refused(tmp_path: Path, spoil: str) -> None:
    arrays: dict[str, Any] = {
        "outputs": np.ones((2, 1, 4, 8, 8), np.float32),
        "latents": np.ones((1, 4, 8, 8), np.float32),
        "noise": np.ones((1, 4, 8, 8), np.float32),
        "inputs": [{"sample": np.ones((1, 4, 8, 8), np.float32), "timestep": np.ones(1, np.float32)} for _ in "ab"],
    }
    whole = Trajectory(prompt="a", seed=0, image=None, mask=None, picture=PICTURE, **arrays)
    Reference("t2i", 2, "test", (whole,)).save(tmp_path / "whole.safetensors")
    Reference.load(tmp_path / "whole.safetensors")
    first = arrays[spoil] if spoil != "inputs" else arrays["inputs"][1]["sample"]
    first.flat[3] = np.nan
    Reference("t2i", 2, "test", (whole,)).save(tmp_path / "spoilt.safetensors")
    with pytest.raises(BundleError, match="NaN or Inf"):
        Reference.load(tmp_path / "spoilt.safetensors")
