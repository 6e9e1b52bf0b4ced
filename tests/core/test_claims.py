"""What a killed process left is removed by the next one that writes there; what a live one has is left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mtu_compile.core.atomic import atomic_file, scratch, staging
from mtu_compile.core.claims import sweep_folder
from mtu_compile.core.errors import ConfigError

PROGRAM = Path(__file__).with_name("killed_writer.py")
#: Moment → what has to be in the place after a process was killed there and the next one has looked.
MOMENTS = {
    "before the folder": "old",
    "at work": "old",
    "old one away": "old",
    "new one in place": "new",
    "old one going": "new",
}

Writer = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder that is to be replaced, alone in its folder."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/marker").write_text("old")
    return tmp_path / "out"


@pytest.fixture
def writer(place: Path) -> Iterator[Writer]:
    """Start a process that writes ``place``, and wait until it has come to a moment."""
    running: list[subprocess.Popen[str]] = []

    def start(moment: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(PROGRAM), str(place), moment]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    assert process.wait() == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_one_removes_what_a_killed_one_left(place: Path, writer: Writer, moment: str) -> None:
    kill(writer(moment))
    assert len(names(place.parent)) > 1  # else there is nothing to remove, and this proves nothing
    with pytest.raises(ConfigError, match="already exists"), staging(place):  # what was there before is back
        pytest.fail("the block must not run")
    assert names(place.parent) == ["out"] and (place / "marker").read_text() == MOMENTS[moment]


def test_a_half_written_file_is_removed_by_the_next(place: Path, writer: Writer) -> None:
    kill(writer("in a file"))
    assert len(names(place)) == 3 and (place / "marker").read_text() == "old"
    with atomic_file(place / "other.txt") as temporary:
        temporary.write_text("whole")
    assert len(names(place)) == 4  # another place: not its business
    (place / "other.txt").unlink()
    with atomic_file(place / "marker") as temporary:
        temporary.write_text("new")
    assert names(place) == ["marker"] and (place / "marker").read_text() == "new"


def test_a_whole_folder_is_swept(place: Path, writer: Writer) -> None:
    kill(writer("in a file"))
    (place / ".somebody").write_text("else's")
    sweep_folder(place)
    assert names(place) == [".somebody", "marker"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_two_live_ones_do_not_hurt_each_other(place: Path, writer: Writer, moment: str) -> None:
    process = writer(moment)
    theirs = {path: path.read_bytes() for path in place.parent.rglob("*") if path.is_file() and path.parts[-2] != "out"}
    assert theirs
    with staging(place, replace=True, marker="marker") as folder:
        (folder / "marker").write_text("mine")
    assert (place / "marker").read_text() == "mine"
    assert {path: path.read_bytes() for path in theirs} == theirs  # nothing of theirs is missing or changed
    assert process.poll() is None


def test_a_live_one_ends_well_beside_another(place: Path, writer: Writer) -> None:
    process = writer("at work")
    with staging(place, replace=True, marker="marker") as folder:
        (folder / "marker").write_text("mine")
    process.communicate("\n")
    assert process.returncode == 0 and names(place.parent) == ["out"] and (place / "marker").read_text() == "new"


def test_what_has_no_lock_is_not_ours(place: Path) -> None:
    for name in (".out.0123abcd.partial", ".out.notours.lock", ".out.lock", ".outer.0123abcd.lock"):
        (place.parent / name).write_text("x")
    before = names(place.parent)
    with staging(place, replace=True, marker="marker") as folder:
        (folder / "marker").write_text("new")
    assert names(place.parent) == before


def test_a_link_in_place_of_a_lock_is_not_followed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".out.0123abcd.lock").symlink_to("precious")
    (tmp_path / ".out.0123abcd.partial").write_text("x")
    before = names(tmp_path)
    with pytest.raises(ConfigError), staging(place):
        pytest.fail("the block must not run")
    assert names(tmp_path) == before


def test_names_that_look_like_patterns_are_taken_literally(tmp_path: Path) -> None:
    target = tmp_path / "a[1]*(b"
    with staging(target) as folder:
        (folder / "x").write_text("x")
    assert names(tmp_path) == [target.name]


def test_scratch_goes_with_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), scratch("mtu-test") as folder:
        (folder / "x").write_text("x")
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        raise KeyboardInterrupt
    assert names(tmp_path) == []
