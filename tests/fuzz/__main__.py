"""Fuzz one reader: ``python -m tests.fuzz NAME [options of libFuzzer] [folder for what it learns]``.

An input that is a fault is written where libFuzzer is told (``-artifact_prefix=``), and the exit code is not 0. The
last line says how many inputs there were, and how many of them were taken.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.child import COUNTS, HARNESSES


def fuzz(name: str, options: list[str]) -> tuple[int, int, int]:
    """Fuzz in a process of its own, which a fault may end in any way.

    Returns:
        (exit code, inputs, of them taken).
    """
    memory = Path("/dev/shm")  # files there cost no disk
    with tempfile.TemporaryDirectory(prefix="mtu-fuzz-", dir=memory if memory.is_dir() else None) as scratch:
        command = [sys.executable, "-m", "tests.fuzz.child", name, *options]
        done = subprocess.run(command, env={**os.environ, "TMPDIR": scratch}, check=False)
        counts = Path(scratch) / COUNTS
        inputs, taken = struct.unpack("=QQ", counts.read_bytes()) if counts.exists() else (0, 0)
    return done.returncode, inputs, taken


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in HARNESSES:
        sys.exit(f"usage: python -m tests.fuzz NAME [-runs=N] [-seed=N] …; NAME is one of {', '.join(HARNESSES)}")
    code, inputs, taken = fuzz(sys.argv[1], sys.argv[2:])
    print(f"{sys.argv[1]}: {inputs} inputs, {taken} taken, exit code {code}")
    sys.exit(code)
