"""A real build that is told to end, or killed, and the one after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import own_process

#: Options of a small build.
BUILD = ("--fp32", "--steps", "4", "--check-pictures", "1", "--calibration-pictures", "1", "--task", "t2i")
Start = Callable[..., "subprocess.Popen[str]"]


WAITING = """
import signal, sys
from pathlib import Path
from mtu_compile.cli.signals import catch_signals
from mtu_compile.core.atomic import staging
# whatever the tests themselves were started by
signal.signal(signal.SIGHUP, signal.SIG_IGN if sys.argv[2] == "nohup" else signal.SIG_DFL)
catch_signals()
with staging(Path(sys.argv[1])):
    print("here", flush=True)
    while True:
        signal.pause()
"""


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path, run_folder: Path) -> Iterator[Start]:
    """Begin to build ``tmp_path/b``, and wait until the stage of the given name is done."""
    running: list[subprocess.Popen[str]] = []

    def begin(stage: str) -> subprocess.Popen[str]:
        place = ["-o", str(tmp_path / "b"), "--no-cache"]
        command = [*own_process(run_folder / "exports"), "build", str(tiny_model), *place, *BUILD]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        running.append(process)
        assert process.stderr is not None
        said = next((line for line in process.stderr if line.startswith(stage)), None)
        assert said is not None, "the build ended too early"
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


@pytest.mark.heavy
def test_a_killed_build_is_cleaned_up_after_and_a_terminated_one_cleans_up_itself(start: Start, tmp_path: Path) -> None:
    killed = start("reference")
    killed.kill()
    killed.wait()
    left = {path.name for path in tmp_path.iterdir()}
    assert sum(name.endswith(".partial") for name in left) == 1 and sum(name.endswith(".scratch") for name in left) == 1
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) > 1_000_000  # weights: worth removing

    next_one = start("load")
    now = {path.name for path in tmp_path.iterdir()}
    assert not left & now and len(now) == 2  # where it works, and the lock
    next_one.send_signal(signal.SIGTERM)
    _, said = next_one.communicate(timeout=300)
    assert next_one.returncode == 143
    assert said.endswith("error: terminated\nhint: nothing was left half-written\n") and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("caller", "code"), [("terminal", 128 + signal.SIGHUP), ("nohup", 128 + signal.SIGTERM)])
def test_a_lost_terminal_ends_a_command_unless_nohup_says_otherwise(tmp_path: Path, caller: str, code: int) -> None:
    command = [sys.executable, "-c", WAITING, str(tmp_path / "b"), caller]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        process.send_signal(signal.SIGHUP)
        if caller == "nohup":  # what is to be ignored is followed by what is not
            process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(timeout=60) == code
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []
