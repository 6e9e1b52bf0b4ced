"""Packages for a board without internet: our own wheel, and the wheels of what it depends on there.

On the board, ``pip install --no-index --find-links BUNDLE/wheels mtu-compile cuda-python`` installs from them.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import ConfigError, MtuError, ToolchainMissing
from mtu_compile.core.version import __version__

if TYPE_CHECKING:
    from packaging.requirements import Requirement
    from packaging.tags import Tag

    from targets.base import BoardSystem

DISTRIBUTION = "mtu-compile"

#: Oldest time a zip file can hold: the same files then give the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)

#: Oldest glibc that manylinux names (PEP 600: 2.17, which is manylinux2014), as the minor version.
_OLDEST_GLIBC = 17

#: Downloads after which dependencies that still miss something are given up; two are the rule.
_ROUNDS = 8


def pack(folder: Path, systems: Sequence[BoardSystem], *, fetch: bool) -> dict[str, Any]:
    """Fill ``folder`` with our wheel and, if ``fetch``, what it needs on every system the board may have.

    Args:
        folder: new or existing.
        systems: ``TargetSpec.board_systems()``.
        fetch: download the dependencies; otherwise the board's own pip has to.

    Returns:
        What the manifest keeps: ``own`` (file name), ``dependencies`` (file names, or ``None`` if left out) and
        ``install`` (the command for the board).

    Raises:
        MtuError: a dependency cannot be downloaded.
        ToolchainMissing: there is no pip.
    """
    own = write_wheel(folder)
    fetched: list[Path] = []
    if fetch:
        for system in systems:
            platforms = manylinux(system.glibc, system.machine)
            fetched += fetch_dependencies(folder, platforms, system.python, extra=system.packages)
    offline = "--no-index " if fetch else ""
    extra = " ".join(sorted({_name(package) for system in systems for package in system.packages}))
    return {
        "own": own.name,
        "dependencies": sorted({path.name for path in fetched}) if fetch else None,
        "install": f"pip install {offline}--find-links BUNDLE/{folder.name} {DISTRIBUTION} {extra}",
    }


def write_wheel(folder: Path) -> Path:
    """Our packages as they are installed here, editable or not, as one pure-Python wheel; equal bytes for equal files.

    Raises:
        ConfigError: mtu-compile runs from a folder it was never installed from, or its metadata are of another version.
    """
    try:
        installed = distribution(DISTRIBUTION)
    except PackageNotFoundError as error:
        raise ConfigError(f"{DISTRIBUTION} is not installed, so there is no wheel for a board", hint=_HINT) from error
    if installed.version != __version__:
        raise ConfigError(f"{DISTRIBUTION} is installed as {installed.version} and runs as {__version__}", hint=_HINT)
    stem = f"{DISTRIBUTION.replace('-', '_')}-{installed.version}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    contents = {**dict(_modules(installed)), **dict(_metadata(installed, f"{stem}.dist-info"))}
    record = f"{stem}.dist-info/RECORD"
    lines = [f"{name},sha256={_record_hash(content)},{len(content)}\n" for name, content in sorted(contents.items())]
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        # The metadata come last (PEP 427), so that a reader finds them without going through the whole file.
        ordered = sorted(contents.items(), key=lambda item: (".dist-info/" in item[0], item[0]))
        for name, content in [*ordered, (record, "".join([*lines, f"{record},,\n"]).encode())]:
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


_HINT = "install it with `pip install -e .` or `pip install mtu-compile`"


def _modules(installed: Distribution) -> Iterator[tuple[str, bytes]]:
    for package in (installed.read_text("top_level.txt") or "").split():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(f"the package {package!r} of {DISTRIBUTION} cannot be found", hint=_HINT)
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in root.rglob("*"):
            parts = path.relative_to(root).parts
            hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
            if path.is_file() and not hidden and path.suffix != ".pyc":
                yield "/".join((package, *parts)), path.read_bytes()


def _metadata(installed: Distribution, folder: str) -> Iterator[tuple[str, bytes]]:
    # A source tree beside the running Python has them as PKG-INFO (an .egg-info folder), which is the same format.
    metadata = installed.read_text("METADATA") or installed.read_text("PKG-INFO")
    if not metadata:
        raise ConfigError(f"the metadata of {DISTRIBUTION} cannot be read", hint=_HINT)
    yield f"{folder}/METADATA", metadata.encode()
    yield f"{folder}/WHEEL", b"Wheel-Version: 1.0\nGenerator: mtu-compile\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    names = HeaderParser().parsestr(metadata).get_all("License-File") or []
    for name in ("entry_points.txt", "top_level.txt"):
        if (text := installed.read_text(name)) is not None:
            yield f"{folder}/{name}", text.encode()
    for name in names:
        beside = Path(str(installed.locate_file(name)))  # beside an .egg-info
        text = installed.read_text(f"licenses/{name}") or (beside.read_text("utf-8") if beside.is_file() else None)
        if text is not None:
            yield f"{folder}/licenses/{name}", text.encode()


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def manylinux(glibc: str, machine: str) -> tuple[str, ...]:
    """Platform tags that a Linux with this glibc ("2.35") takes, newest first; pip has to be given each of them."""
    minors = range(int(glibc.split(".")[1]), _OLDEST_GLIBC - 1, -1)
    return (*(f"manylinux_2_{minor}_{machine}" for minor in minors), f"manylinux2014_{machine}")


def fetch_dependencies(
    folder: Path, platforms: Sequence[str], python_version: str, *, extra: Sequence[str] = ()
) -> tuple[Path, ...]:
    """Download the wheels of our base dependencies, and of theirs, for another machine.

    ``pip download`` takes wheels of another platform, but decides by the Python it runs on which dependencies that
    platform has (``exceptiongroup; python_version < "3.11"`` is left out where pip runs on 3.11). So what came is
    checked against the markers of the board's Python, and what is missing is asked for by name.

    Args:
        folder: wheels already there are kept and counted.
        platforms: platform tags the machine takes (``manylinux``).
        python_version: its CPython ("3.10").
        extra: more requirements ("cuda-python==12.6.*").

    Returns:
        The wheels that an installation there takes, sorted.

    Raises:
        MtuError: pip cannot find or reach a wheel, or the dependencies cannot be made complete.
        ToolchainMissing: there is no pip.
    """
    wanted = [*(r for r in distribution(DISTRIBUTION).requires or () if "extra ==" not in r), *extra]
    folder.mkdir(parents=True, exist_ok=True)
    asked = list(wanted)
    for _ in range(_ROUNDS):
        _download(folder, platforms, python_version, asked)
        used, missing = closure(folder, wanted, platforms, python_version)
        if not missing:
            return tuple(sorted(used))
        asked += missing
    raise MtuError(f"the wheels for Python {python_version} still lack {', '.join(missing)}", hint=_LEAVE_OUT)


_LEAVE_OUT = "is the package registry reachable? --no-wheels leaves these out, and the board has to fetch them"


def _download(folder: Path, platforms: Sequence[str], python_version: str, requirements: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--retries", "1", "--timeout", "20", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--python-version", python_version, *(f"--platform={platform}" for platform in platforms)]
    done = subprocess.run([*command, "--dest", str(folder), *requirements], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise ToolchainMissing("the wheels for the board are fetched by pip, which is not here", hint="install pip")
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    why = "; ".join(errors) or done.stderr.strip() or f"exit code {done.returncode}"
    raise MtuError(f"pip cannot fetch the wheels for Python {python_version} on {platforms[0]}: {why}", hint=_LEAVE_OUT)


def closure(
    folder: Path, wanted: Sequence[str], platforms: Sequence[str], python_version: str
) -> tuple[set[Path], list[str]]:
    """What an installation of ``wanted`` takes from the wheels in ``folder``, and the requirements nothing there meets.

    Markers are those of CPython ``python_version`` on Linux, on the machine that ``platforms`` names.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    environment = _environment(platforms, python_version)
    available = _wheels(folder, platforms, python_version)
    used: set[Path] = set()
    missing: list[str] = []
    seen: set[str] = set()
    queue = [(Requirement(text), frozenset({""})) for text in wanted]
    while queue:
        requirement, extras = queue.pop()
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({**environment, "extra": one}) for one in extras):
            continue
        key = f"{canonicalize_name(requirement.name)}{sorted(requirement.extras)}{requirement.specifier}"
        if key in seen:
            continue
        seen.add(key)
        fitting = [
            (version, path)
            for version, path in available.get(canonicalize_name(requirement.name), [])
            if requirement.specifier.contains(version, prereleases=True)
        ]
        if not fitting:
            extras_text = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
            missing.append(f"{requirement.name}{extras_text}{requirement.specifier}")
            continue
        _, path = max(fitting)
        used.add(path)
        further = frozenset({"", *requirement.extras})
        queue += [(one, further) for one in _requires(path)]
    return used, sorted(missing)


def _wheels(folder: Path, platforms: Sequence[str], python_version: str) -> dict[str, list[tuple[Any, Path]]]:
    """Versions and files of the wheels that fit, by canonical name."""
    from packaging.specifiers import SpecifierSet
    from packaging.utils import parse_wheel_filename

    taken = _tags(platforms, python_version)
    found: dict[str, list[tuple[Any, Path]]] = {}
    for path in folder.glob("*.whl"):
        name, version, _, tags = parse_wheel_filename(path.name)
        needed = SpecifierSet(_read_metadata(path).get("Requires-Python", "")) if tags & taken else None
        if needed is not None and needed.contains(f"{python_version}.0"):
            found.setdefault(name, []).append((version, path))
    return found


def _tags(platforms: Sequence[str], python_version: str) -> set[Tag]:
    from packaging.tags import compatible_tags, cpython_tags

    major, minor = (int(part) for part in python_version.split("."))
    named = [*cpython_tags((major, minor), platforms=platforms)]
    return {*named, *compatible_tags((major, minor), f"cp{major}{minor}", platforms)}


def _requires(wheel: Path) -> list[Requirement]:
    from packaging.requirements import Requirement

    return [Requirement(text) for text in _read_metadata(wheel).get_all("Requires-Dist") or []]


def _read_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return HeaderParser().parsestr(archive.read(name).decode())


def _environment(platforms: Sequence[str], python_version: str) -> dict[str, str]:
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python_version}.0",
        "os_name": "posix",
        "platform_machine": "aarch64" if platforms[0].endswith("aarch64") else "x86_64",
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python_version}.0",
        "python_version": python_version,
        "sys_platform": "linux",
    }


def _name(requirement: str) -> str:
    """``"cuda-python==12.6.*"`` → ``"cuda-python"``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match[0]
