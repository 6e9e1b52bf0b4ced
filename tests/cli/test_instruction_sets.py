"""One INT8 bundle of the example on every instruction set this CPU can stand in for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.runtime import cpu_isa
from tests.commands import EVERY_LEVEL, some_levels

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoji" / "model"

#: Super-resolution is quickest to build, and loses most where activations are multiplied wrongly.
OPTIONS = ("--target", "cpu", "--int8", "--task", "sr", "--steps", 8, "--no-mixed-precision")
PICTURES = ("--calibration-pictures", 4, "--check-pictures", 1)

#: The way activations were quantised before they became unsigned.
SIGNED = """
import targets
from dataclasses import replace
target = targets.get("cpu")
target._spec = replace(target.spec, lowering={"int8": ("mtu::legalise-qdq",)})
"""

pytestmark = [pytest.mark.int8, pytest.mark.heavy]


@pytest.fixture(scope="module", autouse=True)
def few_levels() -> None:
    """Here all of them."""


@pytest.fixture(scope="module")
def cache(run_folder: Path) -> Path:
    """Of these builds, which calibrate alike."""
    return run_folder / "instruction-sets-cache"


@pytest.fixture(scope="module")
def example(made_once: Any, mtu: Callable[..., Any], cache: Path) -> Path:
    def make(folder: Path) -> None:
        place = ("-o", folder / "bundle", "--cache", cache)
        done = mtu("build", EXAMPLE, *OPTIONS, *PICTURES, *place, before=EVERY_LEVEL, fresh=False)
        assert done.code == 0, done.err

    return Path(made_once("instruction-sets", make)) / "bundle"


def test_a_build_passes_at_every_level_and_says_so(example: Path) -> None:
    manifest = bundle.read(example)
    levels = cpu_isa.up_to(cpu_isa.level())
    assert [one.level for one in manifest.instruction_sets] == list(levels)
    assert [one.imitated for one in manifest.instruction_sets] == [True] * (len(levels) - 1) + [False]
    for one in manifest.instruction_sets:
        assert not one.failures
        assert one.worst_sqnr_db["sr"] > 24
    worst = [one.worst_sqnr_db["sr"] for one in manifest.instruction_sets]
    assert max(worst) - min(worst) < 2
    assert {record.id for record in manifest.tasks["sr"].passes} >= {"mtu::uint8-activations", "mtu::fit-int16-sums"}


def test_signed_activations_are_stopped_by_the_gate(
    example: Path, cache: Path, tmp_path: Path, mtu: Callable[..., Any]
) -> None:
    options = (*OPTIONS[:-1], "--quant-config", example, *PICTURES, "--cache", cache)
    done = mtu("build", EXAMPLE, *options, "-o", tmp_path / "signed", before=SIGNED, fresh=False)
    assert done.code == 3, done.err
    assert "sr" in done.err
    assert not (tmp_path / "signed").exists()


def test_a_bundle_that_was_not_proven_here_warns_until_check_has_run(
    example: Path, tmp_path: Path, mtu: Callable[..., Any]
) -> None:
    copy = Path(shutil.copytree(example, tmp_path / "copy"))
    manifest = bundle.read(copy)
    bundle.write(copy, bundle_without_proof(manifest))
    arguments = ("run", copy, "--task", "sr", "--image", source(example), "--steps", 1, "-o", tmp_path / "out.png")

    warned = mtu(*arguments)
    assert warned.code == 0, warned.err
    assert f"instruction set {cpu_isa.level()}" in warned.err and f"mtu-compile check {copy}" in warned.err
    checked = mtu("check", copy, "--json")
    assert checked.code == 0, checked.err
    proofs = json.loads(checked.out)["instruction_sets"]
    assert [one["level"] for one in proofs] == list(some_levels(cpu_isa.level()))
    assert "instruction set" not in mtu(*arguments).err
    assert bundle.read(copy)  # still whole: what was proven here lies beside what the manifest vouches for

    bundle.write(copy, bundle_without_proof(bundle.read(copy, verify=False), steps=3))
    assert "instruction set" in mtu(*arguments).err  # another bundle in the same place is not proven by it


def bundle_without_proof(manifest: bundle.Manifest, steps: int | None = None) -> bundle.Manifest:
    from dataclasses import replace

    tasks = manifest.tasks
    if steps is not None:
        tasks = {name: replace(entry, default_steps=steps) for name, entry in tasks.items()}
    return replace(manifest, instruction_sets=(), tasks=tasks)


def source(folder: Path) -> Path:
    """A picture of the example's."""
    return next(iter(sorted((EXAMPLE / "samples" / "sr").glob("*.png"))))
