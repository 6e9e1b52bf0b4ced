"""Time and peak memory of ``mtu-compile build`` on the example, all tasks, INT8.

python -m bench.build
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

from bench import timing


def main() -> None:
    out = Path("build/bench/bundle")
    command = [
        sys.executable,
        "-m",
        "mtu_compile",
        "build",
        "examples/emoji/model",
        "--int8",
        "--force",
        "-o",
        str(out),
    ]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds.append(round(time.perf_counter() - began, 1))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    timing.write("build", {"seconds": seconds, "peak GB": round(peak, 2), "bundle bytes": size})


if __name__ == "__main__":
    main()
