"""``python -m targets.npu``: set up Intel's NPU compiler on a machine without an NPU."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtu_compile.core.errors import MtuError
from targets.npu.set_up import set_up


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up the compiler, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m targets.npu", description="Set up Intel's NPU compiler on a machine without an NPU."
    )
    parser.add_argument("--wheel", type=Path, help="OpenVINO's Windows wheel, if it was downloaded already")
    parser.add_argument("--sha256", help="the wheel's hash as PyPI publishes it, for a version not known here")
    options = parser.parse_args(arguments)
    try:
        set_up(wheel=options.wheel, sha256=options.sha256, say=lambda line: print(line, flush=True))
    except MtuError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
