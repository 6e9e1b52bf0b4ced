"""Which wheels of a bundle this machine's Python can use (PEP 425, 600). Python's own library alone."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable
from pathlib import PurePosixPath

#: glibc of the names that came before PEP 600.
_OLD = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


def fitting(
    names: Iterable[str],
    *,
    python: tuple[int, int] | None = None,
    glibc: tuple[int, int] | None = None,
    machine: str | None = None,
) -> tuple[str, ...]:
    """Of wheels' file names, one for each package: what fits, and the newest and closest of several.

    Args:
        names: ``numpy-2.4.6-cp311-cp311-manylinux_2_28_aarch64.whl``; folders before them do not matter.
        python, glibc, machine: those of this machine, unless said.
    """
    python = python or sys.version_info[:2]
    glibc = glibc or _glibc()
    machine = machine or platform.machine()
    best: dict[str, tuple[tuple[object, ...], str]] = {}
    for name in names:
        parts = PurePosixPath(name).name.removesuffix(".whl").split("-")
        if not name.endswith(".whl") or len(parts) not in (5, 6):
            continue
        closeness = _python(parts[-3], parts[-2], python)
        if closeness is None or not any(_platform(one, glibc, machine) for one in parts[-1].split(".")):
            continue
        package = re.sub(r"[-_.]+", "-", parts[0]).lower()
        rank = (_version(parts[1]), closeness, name)
        if package not in best or rank > best[package][0]:
            best[package] = (rank, name)
    return tuple(sorted(name for _, name in best.values()))


def _python(tags: str, abis: str, python: tuple[int, int]) -> int | None:
    """How close a wheel's Python is to this one: 2 for this very one, 1 for its stable ABI, 0 for any Python 3."""
    here = f"cp{python[0]}{python[1]}"
    for tag in tags.split("."):
        if tag == here and {here, "none"} & set(abis.split(".")):
            return 2
        found = re.fullmatch(r"cp3(\d+)", tag)
        if found and "abi3" in abis.split(".") and int(found[1]) <= python[1]:
            return 1
        found = re.fullmatch(r"py3(\d*)", tag)
        if found and "none" in abis.split(".") and int(found[1] or 0) <= python[1]:
            return 0
    return None


def _platform(tag: str, glibc: tuple[int, int], machine: str) -> bool:
    if tag in ("any", f"linux_{machine}"):
        return True
    name, _, rest = tag.partition("_")
    if name in _OLD:
        return rest == machine and _OLD[name] <= glibc
    found = re.fullmatch(r"manylinux_(\d+)_(\d+)_(.+)", tag)
    return found is not None and found[3] == machine and (int(found[1]), int(found[2])) <= glibc


def _version(text: str) -> tuple[tuple[int, ...], bool]:
    """Enough to tell the newer of two: numbers, and whether it is a finished release."""
    release = re.match(r"(?:\d+!)?\d+(?:\.\d+)*", text)
    numbers = tuple(map(int, re.findall(r"\d+", release[0]))) if release else ()
    return numbers, re.search(r"(a|b|rc|dev)\d*", text) is None


def _glibc() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", platform.libc_ver()[1])
    return (int(found[1]), int(found[2])) if found else (0, 0)
