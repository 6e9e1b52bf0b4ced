"""``mtu-compile calibrate`` as a user runs it, and a build that is given what it made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from calibration.set_folder import load_folder
from mtu_compile import bundle
from mtu_compile.calibrate import CalibrateOptions, calibrate
from mtu_compile.compile import BuildOptions, build
from mtu_compile.core.errors import CalibrationError, ConfigError, MtuError
from mtu_compile.core.progress import Advance, Progress
from tests.commands import Outcome

Run = Callable[..., Any]
SETTINGS = ("--steps", 4, "--pictures", 3, "--calls", 3)
FILES = {"t2i.safetensors", "inpaint.safetensors", "set.json", "ranges.json"}


class Titles(Progress):
    """Notes which stages were reached."""

    def __init__(self, titles: list[str]) -> None:
        self._titles = titles

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        self._titles.append(title)
        return super().stage(title, total)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="session")
def made(tiny_model: Path, made_once: Any, mtu: Run) -> tuple[Path, Outcome]:
    """The tiny model's calibration set, and what the command said; copy the set to change it."""

    def make(folder: Path) -> None:
        done = mtu("calibrate", tiny_model, "-o", folder / "place" / "set", *SETTINGS)
        assert done.code == 0, done.err
        (folder / "said.json").write_text(json.dumps(asdict(done)))

    folder = made_once("calibrate", make)
    return folder / "place" / "set", Outcome(**json.loads((folder / "said.json").read_text()))


def test_a_set_is_written_and_the_tasks_are_compared(made: tuple[Path, Any]) -> None:
    folder, done = made
    assert set(contents(folder)) == FILES and [path.name for path in folder.parent.iterdir()] == ["set"]
    index = json.loads((folder / "set.json").read_text())
    for task, loaded in load_folder(folder).items():
        assert index["tasks"][task]["sha256"] == loaded.sha256 and loaded.sha256[:12] in done.out
        assert (index["tasks"][task]["pictures"], index["tasks"][task]["calls"]) == (3, 9)
        assert list(loaded.prompts) == ["disc a", "disc b", "disc c"]  # and not the rows for checks
    ranges = json.loads((folder / "ranges.json").read_text())
    assert ranges["tasks"].keys() == {"t2i", "inpaint"} and ranges["layers_compared"] > 20
    assert "conv_in/Conv" not in ranges["tasks"]["t2i"]  # float in INT8
    assert "Largest activation" in done.out and f"of {ranges['layers_compared']} layers" in done.err
    assert str(folder.parent).encode() not in b"".join(contents(folder).values())


def test_the_same_inputs_give_the_same_bytes(
    made: tuple[Path, Any], tiny_model: Path, tmp_path: Path, mtu: Run
) -> None:
    folder = Path(shutil.copytree(made[0], tmp_path / "set"))
    before = contents(folder)
    done = mtu("calibrate", tiny_model, "-o", folder, *SETTINGS)
    assert done.code == 2 and "already exists" in done.err and "--force" in done.err
    done = mtu("calibrate", "-o", folder, *SETTINGS, "--force", "--json", cwd=tiny_model)
    assert done.code == 0, done.err
    assert contents(folder) == before
    summary = json.loads(done.out)
    assert summary["tasks"]["t2i"]["sha256"] == json.loads(before["set.json"])["tasks"]["t2i"]["sha256"]
    assert summary["ranges"]["conflicts"] == json.loads(before["ranges.json"])["conflicts"]


def test_own_data_one_task_and_another_size(tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    data, out = tmp_path / "data", tmp_path / "set"
    (data / "t2i").mkdir(parents=True)
    (data / "t2i" / "metadata.jsonl").write_text("".join(f'{{"prompt": "mine {x}"}}\n' for x in "abcdefgh"))
    options = ("--data", data, "--task", "t2i", "--size", "48x32", "--seed", 3, "--no-ranges", "--quiet")
    done = mtu("calibrate", tiny_model, "-o", out, *SETTINGS, *options)
    assert (done.code, done.out, done.err) == (0, "", "")
    (loaded,) = load_folder(out).values()
    assert list(loaded.prompts) == ["mine a", "mine b", "mine c"] and tuple(loaded.size) == (32, 48)
    assert loaded.inputs[0]["sample"].shape == (2, 4, 8, 12) and loaded.describe()["seed"] == 3
    assert set(contents(out)) == {"t2i.safetensors", "set.json"}


BUILD = ("--task", "inpaint", "--accuracy-gate", "off", "--no-mixed-precision", "--steps", 4, "--check-pictures", 1)


@pytest.fixture(scope="module")
def built(made: tuple[Path, Any], tiny_model: Path, made_once: Any, mtu: Run) -> Any:
    def make(folder: Path) -> None:
        done = mtu("build", tiny_model, "-o", folder / "bundle", "--calibration", made[0], *BUILD)
        assert done.code == 0, done.err
        assert "calibrate inpaint" not in done.err and "reference inpaint" in done.err

    return bundle.read(made_once("bundle-calibrated", make) / "bundle").tasks["inpaint"]


def test_a_build_takes_the_set_and_says_so(made: tuple[Path, Any], built: Any) -> None:
    loaded = load_folder(made[0])["inpaint"]
    assert built.calibration == loaded.sha256
    said = built.provenance.calibration
    assert (said.sha256, said.source, said.strategy) == (loaded.sha256, "set", "stratified")
    assert (said.pictures, said.calls, said.seed) == (3, 9, 0)
    assert list(said.timesteps) == sorted(set(loaded.timesteps), reverse=True)
    assert built.provenance.quantisation.samples == 9


def test_a_build_without_one_captures_the_same(tiny_bundle: Path, tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    """Same rows, steps and calls: what `calibrate` writes is what `build` would have captured."""
    done = mtu("calibrate", tiny_model, "-o", tmp_path / "set", "--steps", 4, "--pictures", 3, "--no-ranges")
    assert done.code == 0, done.err
    loaded = load_folder(tmp_path / "set")
    for task, entry in bundle.read(tiny_bundle).tasks.items():
        assert entry.calibration == loaded[task].sha256
        said = entry.provenance.calibration
        assert said is not None and said.source == "captured by this build"


def other_task(folder: Path, model: Path) -> None:
    shutil.copy(folder / "t2i.safetensors", folder / "inpaint.safetensors")


def flipped(folder: Path, model: Path) -> None:
    content = bytearray((folder / "inpaint.safetensors").read_bytes())
    content[-100] ^= 1
    (folder / "inpaint.safetensors").write_bytes(content)


def edited_index(folder: Path, model: Path) -> None:
    (folder / "set.json").write_text((folder / "set.json").read_text().replace('"pictures": 3', '"pictures": 300'))


def linked(folder: Path, model: Path) -> None:
    (folder / "inpaint.safetensors").rename(folder.parent / "elsewhere")
    (folder / "inpaint.safetensors").symlink_to(folder.parent / "elsewhere")


def other_model(folder: Path, model: Path) -> None:
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text() + "\n")


def removed(folder: Path, model: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flipped, "inpaint.safetensors"),
        (edited_index, "set.json does not say"),
        (other_task, "is for task 't2i'"),
        (linked, "symbolic link"),
        (other_model, "another model"),
        (removed, "does not exist"),
    ],
)
def test_a_set_that_is_not_right_is_refused_before_anything_is_built(
    harm: Any, message: str, made: tuple[Path, Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder, model, place = tmp_path / "set", tmp_path / "model", tmp_path / "place"
    shutil.copytree(made[0], folder)
    shutil.copytree(tiny_model, model)
    place.mkdir()
    harm(folder, model)
    stages: list[str] = []
    with pytest.raises(CalibrationError, match=message) as error:
        build(BuildOptions(model, place / "b", calibration=folder, tasks=("inpaint",)), Titles(stages))
    assert error.value.exit_code == 5 and error.value.hint and stages == ["load"]
    assert list(place.iterdir()) == []


def test_a_set_that_does_not_fit_the_build_is_refused(
    made: tuple[Path, Any], tiny_model: Path, tmp_path: Path, mtu: Run
) -> None:
    done = mtu("build", tiny_model, "-o", tmp_path / "b", "--calibration", made[0], *BUILD, "--size", "48x32")
    assert done.code == 5 and "captured for 32x32 pictures" in done.err and "hint:" in done.err, done.err
    with pytest.raises(ConfigError, match="fp32 is not calibrated") as error:
        build(BuildOptions(tiny_model, tmp_path / "b", precision="fp32", calibration=made[0]))
    assert error.value.exit_code == 2 and error.value.hint
    assert list(tmp_path.iterdir()) == []


def broken_picture(data: Path) -> None:
    (data / "inpaint" / "0.png").write_bytes(b"not a picture")


def truncated_picture(data: Path) -> None:
    noise = Image.effect_noise((32, 32), 90)
    noise.save(data / "inpaint" / "0.png")
    content = (data / "inpaint" / "0.png").read_bytes()
    (data / "inpaint" / "0.png").write_bytes(content[: len(content) // 2])


def no_prompts(data: Path) -> None:
    (data / "inpaint" / "metadata.jsonl").write_text('{"file_name": "0.png"}\n' * 8)


def few_rows(data: Path) -> None:
    (data / "inpaint" / "metadata.jsonl").write_text('{"file_name": "0.png", "prompt": "a"}\n' * 2)


def no_rows(data: Path) -> None:
    (data / "inpaint" / "metadata.jsonl").write_text("")


def empty(data: Path) -> None:
    for path in data.iterdir():
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (broken_picture, "0.png"),
        (truncated_picture, "0.png"),
        (no_prompts, "without a prompt"),
        (few_rows, "2 rows, too few"),
        (no_rows, "no rows"),
        (empty, "no samples for task 't2i'"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_bad_data_is_refused_and_leaves_nothing(
    harm: Callable[[Path], None], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    data, place = tmp_path / "data", tmp_path / "place"
    shutil.copytree(tiny_model / "samples", data)
    place.mkdir()
    harm(data)
    with pytest.raises(MtuError, match=message) as error:
        calibrate(CalibrateOptions(tiny_model, place / "set", data=data, steps=2))
    assert error.value.exit_code == 5 and list(place.iterdir()) == []


def test_what_can_not_be_done_is_said_and_nothing_touched(tiny_model: Path, tmp_path: Path, mtu: Run) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not something mtu-compile wrote"):
        calibrate(CalibrateOptions(tiny_model, tmp_path, force=True))
    with pytest.raises(ConfigError, match="unknown task 'paint'"):
        calibrate(CalibrateOptions(tiny_model, tmp_path / "set", tasks=("paint",)))
    done = mtu("calibrate", tiny_model, "-o", tmp_path / "set", "--data", tmp_path / "gone")
    assert done.code == 5 and "gone is not a folder" in done.err and "hint: give --data DIR" in done.err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"keep.txt": "mine"}
