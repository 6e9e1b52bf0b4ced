"""What was made once is not made again, unless something that it was made of is another."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from mtu_compile.core.errors import MtuError, NotFiniteError
from mtu_compile.core.progress import Progress
from mtu_compile.steps import Steps, Store, key
from tests.steps.some_steps import Marks, Text, failed, repeated, written
from tests.waiting import until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def marks(tmp_path: Path) -> Marks:
    (tmp_path / "marks").mkdir()
    return Marks(tmp_path / "marks")


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Steps]:
    with Store(tmp_path / "cache") as store:
        yield Steps(store, Progress())


def another(tmp_path: Path) -> Steps:
    """A later build's, with the same cache."""
    return Steps(Store(tmp_path / "cache").__enter__(), Progress())


def both(steps: Steps, marks: Marks, words: str = "ab", times: int = 2) -> Text:
    text = steps.run(written.of("write", words, marks))
    return steps.run(repeated.of("repeat", text, times, marks))["repeated"]


def test_a_result_is_made_once(steps: Steps, marks: Marks, tmp_path: Path) -> None:
    first = both(steps, marks)
    assert first.letters == 4 and first.file.read_text() == "abab"
    again = both(another(tmp_path), marks)
    assert again == first
    assert (marks.count("written"), marks.count("repeated")) == (1, 1)


def test_a_result_that_another_build_looks_at_just_now_is_not_taken_for_gone(
    steps: Steps, marks: Marks, tmp_path: Path
) -> None:
    name = steps.run(written.of("write", "ab", marks)).file.parent.name
    held, free = threading.Event(), threading.Event()

    def look() -> None:
        with FileLock(tmp_path / "cache" / "locks" / f"{name}.lock"):
            held.set()
            free.wait(60)

    other = threading.Thread(target=look)
    other.start()
    assert held.wait(60) and steps.store.find(name) is None  # which asks, and does not wait
    threading.Timer(0.2, free.set).start()
    assert steps.store.wait_for(name) is not None
    other.join()


def test_what_became_of_each_call_is_known(steps: Steps, marks: Marks, tmp_path: Path) -> None:
    both(steps, marks)
    assert [(one.step, one.title, one.cached) for one in steps.ran] == [
        ("written", "write", False),
        ("repeated", "repeat", False),
    ]
    later = another(tmp_path)
    both(later, marks, times=3)
    assert [(one.step, one.cached) for one in later.ran] == [("written", True), ("repeated", False)]


def test_only_what_changed_is_made_again(steps: Steps, marks: Marks, tmp_path: Path) -> None:
    both(steps, marks)
    assert both(another(tmp_path), marks, times=3).file.read_text() == "ababab"
    assert (marks.count("written"), marks.count("repeated")) == (1, 2)
    assert both(another(tmp_path), marks, words="cd").file.read_text() == "cdcd"
    assert (marks.count("written"), marks.count("repeated")) == (2, 3)


def test_an_input_counts_by_its_content(steps: Steps, marks: Marks, tmp_path: Path) -> None:
    for name, words in (("one", "ab"), ("two", "ab"), ("three", "cd")):
        (tmp_path / name).write_text(words)
        file = steps.know(tmp_path / name, words)
        steps.run(repeated.of("repeat", Text(file, 2), 2, marks))
    assert marks.count("repeated") == 2
    with pytest.raises(TypeError, match="nothing says what is in"):
        steps.run(repeated.of("repeat", Text(tmp_path / "four", 2), 2, marks))


@pytest.mark.parametrize("change", ["code", "tool", "cpu", "threads"])
def test_other_code_tools_or_cpu_make_another_result(
    steps: Steps, marks: Marks, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    both(steps, marks)
    if change == "code":
        monkeypatch.setattr(key, "code_sha256", lambda: "other")
    elif change == "tool":
        monkeypatch.setattr(key, "tool_version", lambda tool: "0")
    elif change == "cpu":
        monkeypatch.setattr(key, "_model", lambda: "another CPU")
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", "37")
    both(steps, marks)
    # the first says that it depends on neither tools nor the CPU
    assert (marks.count("written"), marks.count("repeated")) == (2 if change == "code" else 1, 2)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1.0, float(np.nextafter(1.0, 2.0))),
        ("1", 1),
        ((1, (2, 3)), ((1, 2), 3)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (np.zeros(2), np.zeros(2, np.float32)),
        (Image.new("L", (2, 3)), Image.new("L", (3, 2))),
        (None, False),
        (True, 1),
    ],
)
def test_different_values_are_different_keys(one: Any, other: Any) -> None:
    def no_file(path: Path) -> str:
        raise AssertionError

    keys = [key.digest(key.plain(value, no_file)) for value in (one, other)]
    assert keys[0] != keys[1]


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(TypeError, match="a step cannot be given a function"):
        key.plain(lambda: 1, str)


@pytest.mark.parametrize("damage", ["byte", "shorter", "gone", "description", "no description"])
def test_a_damaged_result_is_made_again_and_never_used(steps: Steps, marks: Marks, tmp_path: Path, damage: str) -> None:
    text = both(steps, marks)
    file = steps.store.folder(f"written-{_key(steps, 'written')}") / "text"
    if damage == "byte":
        file.write_text("xb")
    elif damage == "shorter":
        file.write_text("a")
    elif damage == "gone":
        file.unlink()
    else:
        description = file.with_name("entry.json")
        description.write_text(
            "{}" if damage == "no description" else description.read_text().replace("write", "wrong")
        )
    # its bytes are looked at when they are needed: here by a step that has not been run
    assert both(another(tmp_path), marks, times=3).file.read_text() == "ababab"
    assert marks.count("written") == 2
    assert text.file.read_text() == "abab"


def test_a_damaged_result_is_not_put_into_a_bundle(steps: Steps, marks: Marks, tmp_path: Path) -> None:
    both(steps, marks).file.write_text("abax")
    later = another(tmp_path)
    placed = later.place(both(later, marks).file, tmp_path / "bundle" / "text")
    assert placed.read_text() == "abab" and marks.count("repeated") == 2


def test_a_step_that_fails_leaves_nothing(steps: Steps, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(NotFiniteError, match="too large") as caught:
            steps.run(failed.of("fail", "too large"))
        assert (caught.value.hint, caught.value.network) == ("try another", "unet")
    assert list((tmp_path / "cache" / "entries").iterdir()) == []


PROGRAM = """
import sys
from pathlib import Path
from mtu_compile.core.progress import Progress
from mtu_compile.steps import Steps, Store
from tests.steps.some_steps import Marks, awaited, written
marks = Marks(Path(sys.argv[2]))
with Store(Path(sys.argv[1])) as store:
    steps = Steps(store, Progress())
    steps.run(written.of("write", "ab", marks))
    print(steps.run(awaited.of("wait", "slow words", marks)).read_text(), *(one.cached for one in steps.ran))
"""


@pytest.fixture
def build(tmp_path: Path, marks: Marks) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start a process that runs two steps, the second of which waits for ``marks.folder / "go"``."""
    begun = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), str(marks.folder)]
        begun.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ}))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def test_a_killed_build_goes_on_where_it_was(
    build: Callable[[], subprocess.Popen[str]], marks: Marks, tmp_path: Path
) -> None:
    first = build()
    until(lambda: marks.count("awaited") == 1)
    first.kill()
    first.wait()
    (marks.folder / "go").touch()
    second = build()
    assert second.communicate(timeout=60)[0] == "slow words True False\n"
    assert (marks.count("written"), marks.count("awaited")) == (1, 2)
    assert not list((tmp_path / "cache" / "entries").glob(".*"))


def test_two_builds_at_once_make_it_once(
    build: Callable[[], subprocess.Popen[str]], marks: Marks, tmp_path: Path
) -> None:
    first = build()
    until(lambda: marks.count("awaited") == 1)
    second = build()
    until(lambda: len(list((tmp_path / "cache" / "leases").glob("*.lock"))) > 1 or second.poll() is not None)
    (marks.folder / "go").touch()
    assert first.communicate(timeout=60)[0] == "slow words False False\n"
    assert second.communicate(timeout=60)[0] == "slow words True True\n"
    assert (marks.count("written"), marks.count("awaited")) == (1, 1)


def test_a_store_without_a_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MtuError, match="cannot be written") as caught, Store(tmp_path / "file"):
        pass
    assert "--cache" in str(caught.value.hint)


def test_what_is_not_kept_goes_when_it_is_not_needed(marks: Marks, tmp_path: Path) -> None:
    with Store(tmp_path / "work", temporary=True) as store:
        steps = Steps(store, Progress())
        text = both(steps, marks)
        steps.release(text.file)
        assert not text.file.exists()
        assert both(steps, marks) == text and marks.count("written") == 1


def _key(steps: Steps, name: str) -> str:
    (found,) = (path.name for path in (steps.store.root / "entries").glob(f"{name}-*"))
    return found.removeprefix(f"{name}-")


def test_pruning_takes_the_least_recently_used_but_nothing_in_use(steps: Steps, marks: Marks, tmp_path: Path) -> None:
    with Store(tmp_path / "cache") as earlier:
        old = Steps(earlier, Progress())
        names = ["old", "mid", "new"]
        files = {name: old.run(written.of(name, name * 1000, marks)).file for name in names}
    for age, name in enumerate(reversed(names)):
        os.utime(files[name].with_name("entry.json"), (1e9 - age, 1e9 - age))
    needed = steps.run(written.of("needed", "x" * 3000, marks)).file
    os.utime(needed.with_name("entry.json"), (1, 1))
    listed = steps.store.ls()
    assert [one.title for one in listed] == ["needed", "old", "mid", "new"]
    assert [one.in_use for one in listed] == [True, False, False, False]
    removed = steps.store.prune(sum(one.bytes for one in listed) - listed[1].bytes - 1)
    assert [one.title for one in removed] == ["old", "mid"]
    assert [name for name in names if files[name].exists()] == ["new"] and needed.exists()
    assert [one.title for one in steps.store.prune(0)] == ["new"]


def test_pruning_clears_what_the_dead_left(
    build: Callable[[], subprocess.Popen[str]], steps: Steps, marks: Marks, tmp_path: Path
) -> None:
    process = build()
    until(lambda: marks.count("awaited") == 1)
    assert [one.in_use for one in steps.store.ls()] == [True] and steps.store.prune(0) == []
    process.kill()
    process.wait()
    assert list((tmp_path / "cache" / "entries").glob(".*"))
    assert [one.title for one in steps.store.prune(0)] == ["write"]
    assert not list((tmp_path / "cache" / "entries").iterdir())
