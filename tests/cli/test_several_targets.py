"""Several targets in one call: what cannot be is refused before anything is built; a bundle is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import targets
from mtu_compile import bundle
from mtu_compile.core.errors import BuildError, ConfigError, ToolchainMissing

Run = Callable[..., Any]

#: The vendor's compiler refuses the UNet, after whatever it shares with others was made.
BROKEN = """
import targets
from mtu_compile.core.errors import BuildError
kind = type(targets.get("onnxruntime"))
builds = kind.build
def fails(self, graph, out, **options):
    if "unet" in out.name:
        raise BuildError("the toolchain gave up", hint="ask its vendor")
    return builds(self, graph, out, **options)
kind.build = fails
"""


#: The vendor's importer does not take the UNet.
PICKY = """
import targets
from mtu_compile.core.errors import BuildError
kind = type(targets.get("onnxruntime"))
def refuses(self, graph, **options):
    raise BuildError("onnxruntime does not know Frobnicate", hint="ask its vendor")
kind.check_graph = refuses
"""


@pytest.mark.parametrize(
    ("refused", "options", "code"),
    [
        ("jetson-orin", ("--fp8",), ConfigError.exit_code),
        ("tensorrt", ("--fp32",), ToolchainMissing.exit_code),
        ("rtx-ada", ("--int8", "--memory", "1MB"), BuildError.exit_code),
        ("onnxruntime", ("--int8",), BuildError.exit_code),
    ],
    ids=["precision", "toolchain", "memory", "importer"],
)
def test_a_target_that_cannot_take_the_model_is_named_and_nothing_is_built(
    tiny_model: Path, tmp_path: Path, mtu: Run, refused: str, options: tuple[str, ...], code: int
) -> None:
    if refused == "tensorrt" and targets.get("tensorrt").probe().ok:
        pytest.skip("TensorRT is installed here")
    if refused == "rtx-ada" and not targets.get("rtx-ada").probe().ok:
        pytest.skip("TensorRT-RTX is not installed here")
    other = {"jetson-orin": "rtx-ada", "tensorrt": "onnxruntime", "rtx-ada": "cpu", "onnxruntime": "cpu"}[refused]
    place = ("-o", tmp_path / "out", "--cache", tmp_path / "cache", "--json")
    before = PICKY if refused == "onnxruntime" else ""
    first, second = (refused, other) if "--memory" in options else (other, refused)  # which both have too little of
    words = ("--task", "t2i", "--target", first, "--target", second, *options, *place)
    done = mtu("build", tiny_model, *words, before=before, fresh=False)
    assert done.code == code, done.err
    assert refused in done.err and done.out == ""
    assert not (tmp_path / "out").exists()
    built = {path.name.partition("-")[0] for path in (tmp_path / "cache").glob("entries/*")}
    assert built <= {"exported_unet", "exported_parts", "rewritten", "importable"}  # what it is found out by


def test_one_that_fails_late_costs_the_others_nothing(tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    out = tmp_path / "out"
    quick = ("--fp32", "--task", "t2i", "--steps", 2, "--check-pictures", 1, "--accuracy-gate", "off")
    both = ("--target", "onnxruntime", "--target", "cpu", "--no-cache")
    done = mtu("build", tiny_model, *both, *quick, "-o", out, "--json", before=BROKEN, fresh=False)
    assert done.code == BuildError.exit_code == 1, done.err
    told = json.loads(done.out)
    assert told["failed"] == {
        "onnxruntime": {"message": "the toolchain gave up", "hint": "ask its vendor", "exit_code": 1}
    }
    assert list(told["bundles"]) == ["cpu"] and told["bundles"]["cpu"]["target"] == "cpu"
    assert [path.name for path in out.iterdir()] == ["cpu"]  # nor half of the other
    assert bundle.read(out / "cpu").target == "cpu"  # whole, to the byte
    assert "error: onnxruntime: the toolchain gave up\nhint: ask its vendor\n" in done.err
