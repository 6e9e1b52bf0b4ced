"""Several targets and later builds share what is the same for them, and the cache is listed and pruned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from mtu_compile import bundle
from mtu_compile.cli.build import conclude_all
from mtu_compile.core.errors import AccuracyError, BuildError, ToolchainMissing

Run = Callable[..., Any]
QUICK = (
    *("--no-mixed-precision", "--task", "t2i", "--calibration-pictures", 1, "--check-pictures", 1),
    *("--accuracy-gate", "off", "--json"),
)


def test_targets_and_builds_share_what_is_the_same(tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    cache, out = tmp_path / "cache", tmp_path / "out"
    place = ("--cache", cache, "-o", out, "--force")
    both = ("--target", "cpu", "--target", "onnxruntime")
    done = mtu("build", tiny_model, *both, "--int8", *place, "--steps", 2, *QUICK)
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["failed"] == {} and list(told["bundles"]) == ["cpu", "onnxruntime"]
    first, second = (_made(told["bundles"][name]) for name in ("cpu", "onnxruntime"))
    assert {"exported_unet", "rewritten", "captured", "recorded", "int8_unet", "engine"} <= first
    assert "engine" in second and not second & {"exported_unet", "rewritten", "captured", "recorded", "int8_unet"}
    for name in ("cpu", "onnxruntime"):
        manifest = bundle.read(out / name)  # whole, to the byte
        assert manifest.target == name and {one.step for one in manifest.provenance.steps if not one.cached} == _made(
            told["bundles"][name]
        )

    done = mtu("build", tiny_model, "--int8", "--cache", cache, "-o", tmp_path / "later", "--steps", 3, *QUICK)
    assert done.code == 0, done.err
    later = _made(json.loads(done.out))
    assert {"captured", "recorded", "int8_unet"} <= later and not later & {
        "exported_unet",
        "exported_parts",
        "rewritten",
    }
    assert "export the UNet: cached" in done.err

    listed = json.loads(mtu("cache", "ls", "--cache", cache, "--json").out)
    assert listed["bytes"] == sum(one["bytes"] for one in listed["entries"]) > 0
    assert {"export the UNet", "quantise t2i"} <= {one["title"] for one in listed["entries"]}
    assert not list(cache.rglob("*.pkl")) and not list(cache.rglob("*.pickle"))
    pruned = json.loads(mtu("cache", "prune", "--cache", cache, "--all", "--json").out)
    assert pruned["freed"] == listed["bytes"] and pruned["bytes"] == 0


def test_the_worst_exit_code_is_the_call_s(capsys: pytest.CaptureFixture[str]) -> None:
    missing = ToolchainMissing("no toolchain", hint="install it")
    for errors, code in (
        ([AccuracyError("bad"), missing], 4),
        ([AccuracyError("bad"), missing, BuildError("broken")], 1),
        ([AccuracyError("bad")], 3),
    ):
        with pytest.raises(click.exceptions.Exit) as ended:
            conclude_all({str(i): error for i, error in enumerate(errors)}, as_json=True, quiet=False)
        assert ended.value.exit_code == code
        said = capsys.readouterr()
        assert [one["exit_code"] for one in json.loads(said.out)["failed"].values()] == [e.exit_code for e in errors]
        assert "error: 0: bad" in said.err


def _made(summary: dict[str, Any]) -> set[str]:
    """Steps that were run."""
    return {one["step"] for one in summary["steps"] if not one["cached"]}
