"""``--int8-weights`` and ``--int4-weights`` by the real line: nothing is calibrated, and the gate judges the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle

Run = Callable[..., Any]
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "model"
QUICK = ("--steps", 3, "--check-pictures", 1)


@pytest.mark.heavy
def test_the_example_in_int4_weights_passes_its_gate(tmp_path: Path, mtu: Run) -> None:
    out = tmp_path / "b"
    done = mtu("build", EXAMPLE, "--int4-weights", "--task", "sr", "-o", out, "--json", *QUICK)
    assert done.code == 0, done.err
    assert "compress sr" in done.err and "calibrate" not in done.err
    found = json.loads(done.out)
    assert found["precision"] == "int4-weights" and found["tasks"]["sr"]["passed"]
    entry = bundle.read(out).tasks["sr"]
    assert entry.calibration is None and entry.provenance.quantisation is None
    made = entry.provenance.compression
    assert made is not None
    assert made.layers == {"Conv": {"int8": 50}, "Gemm": {"int4": 13}, "MatMul": {"int4": 69, "int8": 1}}
    weights = made.parameters["int8"] + made.parameters["int4"] / 2
    assert weights < (out / "unet_sr" / "openvino_model.bin").stat().st_size < 1.1 * weights


def test_int8_weights_of_a_random_model_pass_the_gate_that_bf16_has_to(
    tiny_model: Path, tmp_path: Path, mtu: Run
) -> None:
    done = mtu("build", tiny_model, "--int8-weights", "--task", "t2i", "-o", tmp_path / "b", "--json", *QUICK)
    assert done.code == 0, done.err
    assert json.loads(done.out)["tasks"]["t2i"]["worst_sqnr_db"] > 24
    compressed = bundle.read(tmp_path / "b").tasks["t2i"].provenance.compression
    assert compressed is not None and set(compressed.parameters) == {"int8"}


def test_a_calibration_set_has_no_effect_on_weights_and_is_refused(tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    done = mtu("build", tiny_model, "--int8-weights", "-o", tmp_path / "b", "--calibration", tmp_path, *QUICK)
    assert done.code == 2 and "int8-weights is not calibrated" in done.err
