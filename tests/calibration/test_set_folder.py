"""A folder of calibration sets: it comes back as it was written, or is refused with the file's name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.set_folder import INDEX, RANGES, load_folder, write_folder
from calibration.sets import CalibrationSet
from mtu_compile.core.errors import CalibrationError


def make(task: str, *, model: str = "m", seed: int = 0) -> CalibrationSet:
    rng = np.random.default_rng(seed)
    inputs = []
    for t in (999, 499, 999, 249):
        call = {"sample": rng.standard_normal((2, 4, 8, 8), np.float32), "timestep": np.array([t], np.float32)}
        inputs.append({**call, "encoder_hidden_states": rng.standard_normal((2, 4, 8), np.float32)})
    return CalibrationSet(
        task=task,
        model_sha256=model,
        inputs=tuple(inputs),
        timesteps=tuple(float(call["timestep"][0]) for call in inputs),
        trajectories=(0, 0, 1, 1),
        prompts=("a cat", "a dog"),
        seeds=(1_000_007, 1_000_008),
        scheduler={"_class_name": "DDIMScheduler"},
        steps=20,
        size=(64, 48),
        producer={"mtu-compile": "0"},
    )


SETS = {"t2i": make("t2i"), "super-res": make("super-res", seed=1)}
MEASURED = {"format": "x", "tasks": {"t2i": {"conv": 1.5}}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "set"
    place.mkdir()
    write_folder(place, SETS, MEASURED)
    return place


def test_sets_come_back_as_they_were(folder: Path) -> None:
    loaded = load_folder(folder)
    assert {task: made.sha256 for task, made in loaded.items()} == {t: made.sha256 for t, made in SETS.items()}
    assert json.loads((folder / RANGES).read_text()) == MEASURED
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_the_index_says_what_is_there(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    assert index["model_sha256"] == "m" and list(index["tasks"]) == ["t2i", "super-res"]
    assert index["tasks"]["t2i"] == {
        "file": "t2i.safetensors",
        "sha256": SETS["t2i"].sha256,
        "strategy": "stratified",
        "pictures": 2,
        "calls": 4,
        "steps": 20,
        "seed": 7,
        "timesteps": [[999.0, 2], [499.0, 1], [249.0, 1]],
        "size": [64, 48],
    }
    assert index["ranges"]["file"] == RANGES and len(index["ranges"]["sha256"]) == 64


def test_ranges_may_be_left_out_and_equal_sets_are_equal_files(folder: Path, tmp_path: Path) -> None:
    for name, ranges in (("again", MEASURED), ("bare", None)):
        (tmp_path / name).mkdir()
        write_folder(tmp_path / name, SETS, ranges)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    assert load_folder(tmp_path / "bare").keys() == SETS.keys() and not (tmp_path / "bare" / RANGES).exists()


def test_sets_of_two_models_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="different models"):
        write_folder(tmp_path, {"t2i": make("t2i"), "sr": make("sr", model="n")})


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def edit(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


def other_task(folder: Path) -> None:
    shutil.copy(folder / "super-res.safetensors", folder / "t2i.safetensors")


def other_data(folder: Path) -> None:
    make("t2i", seed=5).save(folder / "t2i.safetensors")


def linked_out(folder: Path) -> None:
    outside = folder.parent / "t2i.safetensors"
    (folder / "t2i.safetensors").rename(outside)
    (folder / "t2i.safetensors").symlink_to(outside)


def linked_index(folder: Path) -> None:
    (folder / INDEX).rename(folder.parent / INDEX)
    (folder / INDEX).symlink_to(folder.parent / INDEX)


def pipe(folder: Path) -> None:
    (folder / "t2i.safetensors").unlink()
    os.mkfifo(folder / "t2i.safetensors")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (flip("t2i.safetensors"), r"t2i\.safetensors"),
        (flip(RANGES), r"set\.json does not say"),
        (edit(lambda index: index["tasks"]["t2i"].update(calls=5)), r"set\.json does not say"),
        (edit(lambda index: index["tasks"]["t2i"].update(sha256="0" * 64)), r"set\.json does not say"),
        (edit(lambda index: index["tasks"]["t2i"].update(file="../t2i.safetensors")), r"set\.json does not say"),
        (edit(lambda index: index["tasks"]["t2i"]["timesteps"].pop()), r"set\.json does not say"),
        (edit(lambda index: index.update(model_sha256="n")), r"set\.json does not say"),
        (edit(lambda index: index.update(comment="x")), r"set\.json does not say"),
        (edit(lambda index: index.update(format="mtu-calibration-folder-9")), "not of this version"),
        (edit(lambda index: index.update(tasks={})), "names no tasks"),
        (edit(lambda index: index["tasks"].update({"../x": {}})), "no name"),
        (edit(lambda index: index["tasks"].update(inpaint={})), r"inpaint\.safetensors is missing"),
        (edit(lambda index: index["tasks"].pop("t2i")), r"t2i\.safetensors does not belong"),
        (edit(lambda index: index.update(ranges=None)), r"ranges\.json does not belong"),
        (other_task, "is for task 'super-res'"),
        (other_data, r"set\.json does not say"),
        (linked_out, r"t2i\.safetensors is a symbolic link"),
        (linked_index, r"set\.json is a symbolic link"),
        (pipe, r"t2i\.safetensors is not a plain file"),
        (lambda folder: (folder / "t2i.safetensors").unlink(), r"t2i\.safetensors is missing"),
        (lambda folder: (folder / RANGES).unlink(), r"ranges\.json is missing"),
        (lambda folder: (folder / INDEX).unlink(), r"set\.json is missing"),
        (lambda folder: (folder / INDEX).write_text("{"), r"set\.json is not JSON"),
        (lambda folder: (folder / INDEX).write_bytes(b"\xff\xfe"), r"set\.json is not JSON"),
        (lambda folder: (folder / INDEX).write_text("[]"), r"set\.json is not a JSON object"),
        (lambda folder: (folder / "more").mkdir(), r"more does not belong"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_anything_changed_is_refused_by_name(folder: Path, damage: Callable[[Path], None], named: str) -> None:
    load_folder(folder)
    damage(folder)
    with pytest.raises(CalibrationError, match=named) as error:
        load_folder(folder)
    assert error.value.exit_code == 5 and error.value.hint
