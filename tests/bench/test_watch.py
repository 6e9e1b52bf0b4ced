"""What a command and its children took, stage by stage."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.build import as_table
from bench.watch import watch

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="memory is read from Linux's /proc")

#: A stage of little, one with a child of 300 MB, and one that maps a file of 200 MB.
STAGES = """
import mmap, subprocess, sys, time
print("small: 0.5 s", file=sys.stderr, flush=True)
subprocess.run([sys.executable, "-c", "import time; x = bytearray(b'1') * 300_000_000; time.sleep(1)"], check=True)
print("a warning: no stage", file=sys.stderr, flush=True)
print("child: 1.5 s", file=sys.stderr, flush=True)
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
    sum(pages[::4096])
    time.sleep(1)
print("mapped: 1.0 s", file=sys.stderr, flush=True)
print("small: 0.25 s", file=sys.stderr, flush=True)
"""


def test_memory_counts_to_the_stage_and_kind_it_belongs_to(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(200_000_000))
    seen = watch([sys.executable, "-c", STAGES, str(file)])
    assert list(seen.stages) == ["small", "child", "mapped", "rest"]
    assert [taken.said for taken in seen.stages.values()] == [0.75, 1.5, 1.0, 0.0]
    memory = {title: taken.memory for title, taken in seen.stages.items()}
    assert 300e6 < memory["child"].own < 400e6 and memory["child"].mapped < 100e6
    assert memory["mapped"].own < 100e6 and memory["mapped"].mapped > 190e6
    assert memory["small"].own < 100e6
    assert seen.whole.memory.own == memory["child"].own and seen.whole.memory.together >= memory["child"].own
    assert seen.stages["child"].seconds >= 1.0 and seen.stages["mapped"].seconds >= 1.0
    assert sum(taken.seconds for taken in seen.stages.values()) == pytest.approx(seen.whole.seconds)
    assert "everything" in as_table(seen) and "a warning: no stage" in seen.log


def test_cpu_time_counts_what_children_used_after_they_have_ended() -> None:
    burn = "import time; end = time.process_time() + 1\nwhile time.process_time() < end: pass"
    stages = f"""
import subprocess, sys, time
subprocess.run([sys.executable, "-c", {burn!r}], check=True)
print("burning: 1.0 s", file=sys.stderr, flush=True)
time.sleep(0.5)
print("sleeping: 0.5 s", file=sys.stderr, flush=True)
"""
    seen = watch([sys.executable, "-c", stages])
    assert seen.stages["burning"].cpu >= 0.99 > 0.4 > seen.stages["sleeping"].cpu
    assert seen.whole.cpu >= seen.stages["burning"].cpu


def test_a_command_that_fails_is_an_error() -> None:
    failing = [sys.executable, "-c", "import sys; print('read: 0.5 s', file=sys.stderr); sys.exit('no such model')"]
    with pytest.raises(subprocess.CalledProcessError) as failed:
        watch(failing)
    assert "no such model" in failed.value.stderr
    seen = watch(failing, check=False)
    assert seen.code == 1 and list(seen.stages) == ["read", "rest"]
