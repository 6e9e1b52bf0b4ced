"""``build --int8-decoder``: the VAE decoder in INT8, what is said of it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from calibration.set_folder import load_folder, write_folder
from mtu_compile import bundle, runtime
from mtu_compile.accuracy.formulas import picture_psnr_db
from tests.cli.conftest import BUILD
from tests.commands import Outcome

Run = Callable[..., Outcome]
#: As ``tiny_bundle`` is built.
OPTIONS = ("--target", "cpu", "--int8", "--accuracy-gate", "warn", *BUILD)


@pytest.fixture(scope="module")
def built(tiny_model: Path, build_once: Callable[..., Path]) -> Path:
    return build_once(tiny_model, *OPTIONS, "--int8-decoder")


def int8_weights(bundle_folder: Path, engine: bundle.EngineRef) -> int:
    model = openvino.Core().read_model(bundle_folder / engine.path)
    kinds = (openvino.Type.i8, openvino.Type.u8)
    return sum(op.get_type_name() == "Constant" and op.get_element_type() in kinds for op in model.get_ops())


@pytest.mark.heavy
def test_it_is_quantised_and_its_pictures_are_compared(built: Path) -> None:
    manifest = bundle.read(built)
    record = manifest.provenance.decoder
    assert record is not None and record.pictures == 4
    assert 20 < record.worst_psnr_db <= record.mean_psnr_db
    done, of = record.quantisation.layers["Conv"]
    assert 0 < done < of  # the first and the last stay float
    assert {"decoder.conv_in/Conv", "decoder.conv_out/Conv"} <= set(record.quantisation.float_layers)
    assert int8_weights(built, manifest.vae_decoder) >= done
    assert manifest.vae_encoder is not None and int8_weights(built, manifest.vae_encoder) == 0


@pytest.mark.heavy
def test_pictures_are_nearly_those_of_the_float_decoder(built: Path, tiny_bundle: Path) -> None:
    assert bundle.read(tiny_bundle).provenance.decoder is None
    made = []
    for folder in (tiny_bundle, built):
        with runtime.load(folder) as loaded:
            made.append(np.asarray(loaded.run("t2i", "disc a", seed=3, steps=4).image))
    assert not np.array_equal(*made)
    assert picture_psnr_db(*made) > 20


@pytest.mark.heavy
def test_it_runs_at_every_instruction_set(built: Path, mtu: Run) -> None:
    done = mtu("check", built)
    assert done.code in (0, 1), done.err  # random weights may lose more than thresholds allow; it ran


@pytest.mark.heavy
def test_a_build_that_fails_says_what_the_decoder_costs(
    tiny_model: Path, tmp_path: Path, stricter: Path, mtu: Run
) -> None:
    told = ("--target", "cpu", "--int8", "--int8-decoder", "--task", "t2i", "--thresholds", stricter)
    done = mtu("build", tiny_model, "-o", tmp_path / "b", *told, *BUILD)
    assert done.code == 3, done.err
    assert "decoder in INT8 alone makes pictures of" in done.err and "leaving out --int8-decoder" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.heavy
def test_what_it_says(built: Path, mtu: Run) -> None:
    said = mtu("inspect", built)
    assert said.code == 0 and "VAE decoder" in said.out and "INT8" in said.out


def test_a_float_build_refuses_it(tiny_model: Path, mtu: Run, tmp_path: Path) -> None:
    done = mtu("build", tiny_model, "--fp32", "--int8-decoder", "-o", tmp_path / "b")
    assert done.code == 2 and "leaves the VAE decoder float" in done.err and not (tmp_path / "b").exists()


def test_a_set_without_final_latents_is_refused(tiny_model: Path, mtu: Run, tmp_path: Path) -> None:
    sets = tmp_path / "set"
    done = mtu("calibrate", tiny_model, "-o", sets, "--task", "t2i", "--steps", 4, "--pictures", 3, "--calls", 3)
    assert done.code == 0, done.err
    (kept,) = load_folder(sets).values()
    assert kept.latents is not None and kept.latents.shape == (3, 1, 4, 8, 8)
    older = replace(kept, latents=None)
    assert older.sha256 != kept.sha256
    write_folder(sets, {"t2i": older})
    assert load_folder(sets)["t2i"].latents is None
    given: tuple[Any, ...] = ("--calibration", sets, "--int8-decoder", "-o", tmp_path / "b")
    refused = mtu("build", tiny_model, *OPTIONS, "--task", "t2i", *given)
    assert refused.code == 5 and "no final latents" in refused.err and not (tmp_path / "b").exists()
