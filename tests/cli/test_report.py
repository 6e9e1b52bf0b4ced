"""``mtu-compile report`` on a bundle that was built by the real line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mtu_compile import bundle
from mtu_compile.accuracy.metrics import judged
from mtu_compile.report.pictures import difference as difference_of
from mtu_compile.runtime.reference import Reference
from tests.report_checks import Page, decode, markup_problems

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def reported(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, mtu: Run) -> tuple[Any, str, dict[str, Any]]:
    """What the command said, the page, and the same as JSON."""
    page = tmp_path_factory.mktemp("report") / "page.html"
    done = mtu("report", tiny_bundle, "-o", page, "--json")
    assert done.code == 0, done.err
    return done, page.read_text(encoding="utf-8"), json.loads(done.out)


def test_the_page_shows_the_original_and_what_the_engines_make(tiny_bundle: Path, reported: Any) -> None:
    _, text, _ = reported
    assert markup_problems(text) == []
    assert "t2i/metadata.jsonl line 6 (check)" in text and "has no effect" in text
    carried = [decode(str(a["src"])) for a in Page(text).of("img")]
    manifest = bundle.read(tiny_bundle)
    for name, entry in manifest.tasks.items():
        assert entry.reference is not None
        for one in Reference.load(tiny_bundle / entry.reference).trajectories:
            wanted = np.asarray(one.picture)
            places = [i for i, picture in enumerate(carried) if np.array_equal(picture, wanted)]
            assert places, f"a picture of {name} is missing"
            made, difference = carried[places[-1] + 1], carried[places[-1] + 2]
            assert not np.array_equal(made, wanted)  # INT8 is not lossless: a copy would be
            assert np.array_equal(difference, np.asarray(difference_of(one.picture, Image.fromarray(made))))


def test_a_bundle_below_its_thresholds_is_reported_and_is_no_error(tiny_bundle: Path, tmp_path: Path) -> None:
    """A bundle that asks for what no INT8 engine meets, of one of its two tasks, and nothing of the other."""
    from mtu_compile.cli.report import command

    strict = tmp_path / "strict"
    shutil.copytree(tiny_bundle, strict)
    manifest = bundle.read(strict)
    asked = {"t2i": {metric.name: None for metric in judged()}, "inpaint": {"sqnr_db": 150.0}}
    tasks = {name: replace(entry, thresholds=asked[name]) for name, entry in manifest.tasks.items()}
    bundle.write(strict, replace(manifest, tasks=tasks))
    page = tmp_path / "page.html"
    done = CliRunner().invoke(command, [str(strict), "-o", str(page)])
    assert done.exit_code == 0, done.output
    assert "FAIL  inpaint: sqnr_db below 150 at 8 of 8 calls" in done.stderr and "t2i: sqnr" not in done.stderr
    text = " ".join(Page(page.read_text(encoding="utf-8")).text.split())
    assert "1 of 2 tasks is below a threshold: inpaint." in text
    assert text.count("sqnr_db below 150 at 8 of 8 calls") == 2


def test_the_json_says_what_the_check_says(tiny_bundle: Path, reported: Any) -> None:
    _, _, found = reported
    manifest = bundle.read(tiny_bundle)
    for task in found["tasks"]:
        accuracy = manifest.tasks[task["entry"]].accuracy
        assert accuracy is not None
        now = {metric["key"]: metric["value"] for metric in task["metrics"]}
        assert now["worst_sqnr_db"] == pytest.approx(accuracy["worst_sqnr_db"])
        calls = [call["sqnr_db"] for one in task["pictures"] for call in one["calls"]]
        assert len(calls) == task["steps"] * len(task["pictures"]) and min(calls) == now["worst_sqnr_db"]
    sizes = sum((tiny_bundle / name).stat().st_size for name in manifest.files)
    assert found["bytes"] == sizes


def test_the_bundle_is_left_as_it_was(tiny_bundle: Path, reported: Any) -> None:
    bundle.read(tiny_bundle, verify=True)
    assert not tiny_bundle.with_name(f"{tiny_bundle.name}-report.html").exists()  # --json alone writes none


def test_an_existing_page_is_kept_unless_told_otherwise(tiny_bundle: Path, tmp_path: Path, mtu: Run) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "copy")
    page = tmp_path / "copy-report.html"
    page.write_text("mine")
    done = mtu("report", tmp_path / "copy")
    assert done.code == 2 and "already exists" in done.err and "--force" in done.err
    assert page.read_text() == "mine"
    done = mtu("report", "copy", "--force", "--quiet", cwd=tmp_path)
    assert done.code == 0 and done.out == "" and done.err == ""
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "copy-report.html"]


def test_a_page_inside_the_bundle_is_refused(tiny_bundle: Path, mtu: Run) -> None:
    done = mtu("report", tiny_bundle, "-o", tiny_bundle / "page.html")
    assert done.code == 2 and "inside the bundle" in done.err


def test_a_damaged_bundle_leaves_no_page(tiny_bundle: Path, tmp_path: Path, mtu: Run) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "copy")
    weights = tmp_path / "copy" / "unet" / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    done = mtu("report", tmp_path / "copy")
    assert done.code == 5 and "unet/openvino_model.bin" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_page_that_cannot_be_drawn_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtu_compile.cli.report import command

    def half(report: object) -> str:
        raise MemoryError("half-way")

    page = tmp_path / "page.html"
    page.write_text("mine")
    monkeypatch.setattr("mtu_compile.report.render.render", half)
    done = CliRunner().invoke(command, [str(tiny_bundle), "-o", str(page), "--force", "-q"])
    assert isinstance(done.exception, MemoryError)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"] and page.read_text() == "mine"
