"""Builds and checks a version with the packages it will run with, in a process of its own; says what it does in JSON.

``python -m mtu_compile.board.prove build|check BUNDLE`` writes lines to its standard output: ``{"stage": title}`` as it
goes on, and last ``{"result": …}`` or ``{"error": …}``. What libraries print goes to its standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from mtu_compile import bundle
from mtu_compile.board import machine, measure
from mtu_compile.board.build import build_bundle, buildable
from mtu_compile.board.check import check_bundle
from mtu_compile.core import vendors
from mtu_compile.core.errors import MtuError
from mtu_compile.core.progress import Advance, Progress, ignore
from mtu_compile.runtime import proven

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class LineProgress(Progress):
    """Tells another process of every stage."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        say(self._out, {"stage": title})
        yield ignore


def say(out: IO[str], message: dict[str, Any]) -> None:
    """One line."""
    out.write(json.dumps(message) + "\n")
    out.flush()


def build(root: Path, progress: Progress) -> dict[str, Any]:
    """Build what only this machine can; nothing where the bundle's engines are opened as they are."""
    if not buildable(bundle.read(root)):  # asked for by hand
        return {"engines": [], "notes": []}
    return build_bundle(root, progress=progress).to_json()


def check(root: Path, progress: Progress) -> dict[str, Any]:
    """Accuracy, latency, memory, the device that ran it, and the versions of what it ran with."""
    result = check_bundle(root, progress=progress)
    if result.instruction_sets:
        proven.record(root, result.instruction_sets)
    with progress.stage("measure"):
        measured = measure.measure(root)
    return {
        "accuracy": result.to_json(),
        "failures": list(result.failures),
        "measured": measured.to_json(),
        "versions": versions(),
        "board": machine.probe().to_json(),
    }


def versions() -> dict[str, str]:
    """Of the packages that decide what comes out."""
    found = {}
    for name in ("mtu-compile", "numpy", *dict.fromkeys(vendors.packages())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody is left to hear the answer
    step, root = arguments
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        act = {"build": build, "check": check}[step]
        say(out, {"result": act(Path(root).resolve(), LineProgress(out))})
    except MtuError as error:
        told = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
        say(out, {"error": told})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
