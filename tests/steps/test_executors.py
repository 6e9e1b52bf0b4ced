"""Steps in other processes give what they give here, errors and progress included, and leave nobody behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from joblib.externals import loky

from mtu_compile.core.errors import ConfigError, MtuError, NotFiniteError
from mtu_compile.core.progress import Progress
from mtu_compile.steps import Steps, Store
from mtu_compile.steps.executors import InThisProcess, executor_for
from mtu_compile.steps.executors.in_processes import InProcesses
from tests.steps.heard import Heard
from tests.steps.some_steps import Marks, drawn, failed, killed, met, repeated, written
from tests.waiting import alive, until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def processes() -> Iterator[InProcesses]:
    executor = InProcesses()
    yield executor
    executor.close()


@pytest.fixture
def steps(tmp_path: Path, processes: InProcesses) -> Iterator[Steps]:
    (tmp_path / "marks").mkdir()
    with Store(tmp_path / "cache") as store:
        yield Steps(store, Heard(), processes)


def test_results_are_those_of_this_process(steps: Steps, tmp_path: Path) -> None:
    marks = Marks(tmp_path / "marks")
    text = steps.run(written.of("write", "ab", marks))
    found = steps.run_all([repeated.of(f"repeat {times}", text, times, marks) for times in (1, 2, 3)])
    assert [one["repeated"].file.read_text() for one in found] == ["ab", "abab", "ababab"]
    (own,) = {path.name.split("-")[1] for path in marks.folder.iterdir()}
    assert own != str(os.getpid())
    with Store(tmp_path / "cache") as store:  # and are taken for them
        here = Steps(store, Progress())
        assert here.run(repeated.of("repeat", here.run(written.of("write", "ab", marks)), 2, marks)) == found[1]
        assert marks.count("repeated") == 3


def test_progress_is_heard(steps: Steps) -> None:
    assert steps.run(drawn.of("draw", 2)) != os.getpid()
    assert isinstance(steps.progress, Heard)
    assert steps.progress.said == [("draw", 2), 1, 1, "end", "drawn"]
    assert not list(steps.store.events.parent.iterdir())


def test_an_error_is_itself(steps: Steps) -> None:
    with pytest.raises(NotFiniteError, match="too large") as caught:
        steps.run(failed.of("fail", "too large"))
    error = caught.value
    assert (error.hint, error.network, error.task, error.step, error.exit_code) == ("try another", "unet", "t2i", 3, 3)


def test_a_process_that_is_killed_is_said_plainly_and_the_next_step_runs(steps: Steps) -> None:
    with pytest.raises(MtuError, match="the process of work hard was killed") as caught:
        steps.run(killed.of("work hard"))
    assert "plan" in str(caught.value.hint)
    assert steps.run(drawn.of("draw", 1)) > 0


def test_steps_that_keep_one_core_busy_run_beside_each_other(
    steps: Steps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loky, "cpu_count", lambda: 2)
    marks = Marks(tmp_path / "marks")
    first, second = steps.run_both(met.of("meet", "a", "b", marks), met.of("meet", "b", "a", marks))
    assert first != second
    # Others take all cores and much memory: one after the other, in one process.
    assert len(set(steps.run_all([drawn.of("draw", units) for units in (11, 12, 13)]))) == 1


def test_a_process_that_has_grown_is_ended(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [steps.run(drawn.of("draw", units)) for units in (3, 4)]
    assert first[0] == first[1]
    monkeypatch.setattr("mtu_compile.steps.executors.in_processes.KEPT", 0)
    steps.run(drawn.of("draw", 5))
    assert steps.run(drawn.of("draw", 6)) != first[0]


PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which nohup and the like take away
from pathlib import Path
from mtu_compile.core.progress import Progress
from mtu_compile.steps import Steps, Store
from mtu_compile.steps.executors.in_processes import InProcesses
from tests.steps.heard import Heard
from tests.steps.some_steps import Marks, awaited
executor = InProcesses()
try:
    with Store(Path(sys.argv[1])) as store:
        Steps(store, Progress(), executor).run(awaited.of("wait", "words", Marks(Path(sys.argv[2]))))
finally:
    executor.close()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_when_the_build_ends_its_processes_do(tmp_path: Path, how: signal.Signals) -> None:
    marks = Marks(tmp_path / "marks")
    marks.folder.mkdir()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "cache"), str(marks.folder)]
    build = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: marks.count("awaited") == 1)
    (mark,) = marks.folder.iterdir()
    worker = int(mark.name.split("-")[1])
    assert worker != build.pid and alive(worker)
    build.send_signal(how)
    _, said = build.communicate(timeout=60)  # by all that it began, too
    until(lambda: not alive(worker))
    assert "leaked" not in said and "resource_tracker" not in said
    assert not list((tmp_path / "cache" / "entries").glob("awaited-*"))


def test_large_models_get_processes_of_their_own() -> None:
    assert isinstance(executor_for("auto", 10**8), InThisProcess)
    assert isinstance(executor_for("auto", 10**10), InProcesses)
    assert isinstance(executor_for("local", 10), InProcesses)
    with pytest.raises(ConfigError, match="there is no executor 'moon'"):
        executor_for("moon", 10)
