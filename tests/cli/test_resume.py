"""A build that was killed goes on where it was, and its bundle is the one that an undisturbed build makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import assert_same
from tests.commands import own_process

Begin = Callable[..., "subprocess.Popen[str]"]

#: What is deterministic, and has every kind of step but the search, which measures times.
BUILD = (
    *("--int8", "--no-mixed-precision", "--task", "t2i", "--steps", "2"),
    *("--calibration-pictures", "1", "--check-pictures", "1", "--accuracy-gate", "off"),
)


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, mtu: Callable[..., Any]) -> Path:
    """Its bundle, made without a cache."""
    place = tmp_path_factory.mktemp("undisturbed") / "bundle"
    done = mtu("build", tiny_model, *BUILD, "-o", place, "--no-cache")
    assert done.code == 0, done.err
    return place


@pytest.fixture
def begin(tiny_model: Path, tmp_path: Path, run_folder: Path) -> Iterator[Begin]:
    """Begin a build in ``tmp_path``, with the cache there; all end with the test."""
    begun: list[subprocess.Popen[str]] = []

    def begin(name: str, *options: object) -> subprocess.Popen[str]:
        words = ("build", tiny_model, *BUILD, "-o", tmp_path / name, "--cache", tmp_path / "cache", *options)
        command = [*own_process(run_folder / "exports"), *map(str, words)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        begun.append(subprocess.Popen(command, text=True, env=environment, **pipes))
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.heavy
def test_killed_at_several_points_it_goes_on_and_makes_the_same_bundle(
    begin: Begin, undisturbed: Path, tmp_path: Path
) -> None:
    kept: list[set[str]] = []
    for stage in ("calibrate t2i", "parity t2i"):
        build = begin("bundle")
        assert build.stderr is not None
        assert any(line.startswith(f"{stage}:") for line in build.stderr), f"it ended before it had done: {stage}"
        build.send_signal(signal.SIGKILL)
        build.communicate()
        assert not (tmp_path / "bundle").exists()
        kept.append({path.name for path in (tmp_path / "cache" / "entries").glob("[!.]*")})
    assert all(earlier < later for earlier, later in pairwise(kept))
    last = begin("bundle", "--json")
    out, said = last.communicate(timeout=600)
    assert last.returncode == 0, said
    ran = {one["title"]: one["cached"] for one in json.loads(out)["steps"]}
    assert all(ran[title] for title in ("export the UNet", "passes t2i", "calibrate t2i", "quantise t2i"))
    assert "export the UNet: cached" in said and "quantise t2i: cached" in said
    assert_same(tmp_path / "bundle", undisturbed)
    assert {path.name for path in tmp_path.iterdir()} == {"bundle", "cache"}  # nor is anything left of the killed
    assert not list((tmp_path / "cache" / "entries").glob(".*"))


@pytest.mark.heavy
def test_two_builds_at_once_with_one_cache_make_everything_once(
    begin: Begin, undisturbed: Path, tmp_path: Path
) -> None:
    both = [begin(name, "--json") for name in ("one", "two")]
    made = []
    for name, build in zip(("one", "two"), both, strict=True):
        out, said = build.communicate(timeout=600)
        assert build.returncode == 0, said
        made += [one["title"] for one in json.loads(out)["steps"] if not one["cached"]]
        assert_same(tmp_path / name, undisturbed)
    assert len(made) == len(set(made)) and {"export the UNet", "calibrate t2i", "quantise t2i"} <= set(made)
