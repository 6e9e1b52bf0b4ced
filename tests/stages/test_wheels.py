"""The packages a bundle brings to a board without internet."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mtu_compile.core.errors import ConfigError, MtuError, ToolchainMissing
from mtu_compile.core.version import __version__
from mtu_compile.stages import wheels

JETPACK_6 = wheels.manylinux("2.35", "aarch64")


@dataclass(frozen=True)
class System:
    """As much of a board's system as decides which wheels fit."""

    python: str = "3.10"
    glibc: str = "2.35"
    machine: str = "aarch64"
    packages: tuple[str, ...] = ("cuda-python==12.6.*",)


SYSTEM = System()


def fake(folder: Path, name: str, *requires: str, version: str = "1.0", tag: str = "py3-none-any", **more: str) -> None:
    """A wheel with nothing but metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {one}" for one in requires]
    lines += [f"{key.replace('_', '-')}: {value}" for key, value in more.items()]
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")


def found(folder: Path, *wanted: str, python: str = "3.10", platforms: Sequence[str] = JETPACK_6) -> Any:
    used, missing = wheels.closure(folder, wanted, platforms, python)
    return sorted(path.name.split("-")[0] + "-" + path.name.split("-")[1] for path in used), missing


def test_our_wheel_holds_our_packages_and_its_record_is_right(tmp_path: Path) -> None:
    path = wheels.write_wheel(tmp_path)
    assert path.name == f"mtu_compile-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for name in (
        "mtu_compile/board/build.py",
        "mtu_compile/cli/__init__.py",
        "passes/base.py",
        "targets/openvino/cpu.py",
    ):
        assert name in contents
    assert not [name for name in contents if "__pycache__" in name or name.startswith(("tests", "examples"))]
    info = f"mtu_compile-{__version__}.dist-info"
    assert b"mtu-compile = mtu_compile.cli:main" in contents[f"{info}/entry_points.txt"]
    assert b"Requires-Dist: numpy" in contents[f"{info}/METADATA"]
    assert b"Apache License" in contents[f"{info}/licenses/LICENSE"]
    lines = [line.rsplit(",", 2) for line in contents.pop(f"{info}/RECORD").decode().splitlines()]
    assert [f"{info}/RECORD", "", ""] in lines
    recorded = {name: (digest, size) for name, digest, size in lines if digest}
    assert recorded.keys() == contents.keys()
    for name, content in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        assert recorded[name] == (f"sha256={digest}", str(len(content)))


def test_equal_files_give_equal_bytes(tmp_path: Path) -> None:
    first, second = wheels.write_wheel(tmp_path / "a"), wheels.write_wheel(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()


def test_pip_installs_our_wheel_without_an_index(tmp_path: Path) -> None:
    path = wheels.write_wheel(tmp_path / "wheels")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(path)], check=True, capture_output=True)
    code = "import mtu_compile; print(mtu_compile.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(tmp_path / "site")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(tmp_path / "site"))


def test_a_wheel_of_metadata_that_are_not_these_packages_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "__version__", "99.0")
    with pytest.raises(ConfigError, match=r"runs as 99\.0"):
        wheels.write_wheel(tmp_path)
    assert not list(tmp_path.iterdir())


def test_platform_tags_go_from_the_newest_glibc_to_the_oldest() -> None:
    assert JETPACK_6[0] == "manylinux_2_35_aarch64"
    assert JETPACK_6[-2:] == ("manylinux_2_17_aarch64", "manylinux2014_aarch64")
    assert "manylinux_2_28_aarch64" in JETPACK_6


def test_markers_are_those_of_the_board_not_of_this_python(tmp_path: Path) -> None:
    fake(tmp_path, "anyio", 'exceptiongroup>=1; python_version < "3.11"', 'wincurses; sys_platform == "win32"')
    assert found(tmp_path, "anyio", python="3.10") == (["anyio-1.0"], ["exceptiongroup>=1"])
    assert found(tmp_path, "anyio", python="3.12") == (["anyio-1.0"], [])
    fake(tmp_path, "torchlike", 'armlib; platform_machine == "aarch64"', 'intellib; platform_machine == "x86_64"')
    assert found(tmp_path, "torchlike")[1] == ["armlib"]


def test_wheels_of_another_machine_python_or_version_do_not_count(tmp_path: Path) -> None:
    fake(tmp_path, "numpy", version="2.5", tag="cp312-cp312-manylinux_2_28_aarch64")
    fake(tmp_path, "numpy", version="2.4", tag="cp310-cp310-manylinux_2_28_x86_64")
    fake(tmp_path, "numpy", version="2.3", tag="cp310-cp310-manylinux_2_39_aarch64")
    fake(tmp_path, "numpy", version="9.0", Requires_Python=">=3.11")
    assert found(tmp_path, "numpy>=1.26") == ([], ["numpy>=1.26"])
    fake(tmp_path, "numpy", version="2.2", tag="cp310-cp310-manylinux_2_17_aarch64.manylinux2014_aarch64")
    assert found(tmp_path, "numpy>=1.26") == (["numpy-2.2"], [])
    assert found(tmp_path, "numpy<2") == ([], ["numpy<2"])
    assert found(tmp_path, "numpy", python="3.12") == (["numpy-9.0"], [])


def test_extras_and_circles_are_followed(tmp_path: Path) -> None:
    fake(tmp_path, "a", "b[fast]")
    fake(tmp_path, "b", "a", 'speed; extra == "fast"', 'slow; extra == "other"')
    assert found(tmp_path, "a") == (["a-1.0", "b-1.0"], ["speed"])


def test_what_pip_leaves_out_for_another_python_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(folder: Path, platforms: Any, python: str, requirements: Sequence[str]) -> None:
        asked.append(list(requirements))
        for name in requirements:
            fake(folder, "".join(c for c in name.split(">")[0].split("=")[0] if c.isalpha()), version="99.0")
        fake(folder, "click", 'exceptiongroup; python_version < "3.11"', version="99.0")

    monkeypatch.setattr(wheels, "_download", download)
    paths = wheels.fetch_dependencies(tmp_path, JETPACK_6, "3.10", extra=["more"])
    assert asked[1] == [*asked[0], "exceptiongroup"] and len(asked) == 2
    names = {path.name.split("-")[0] for path in paths}
    assert {"numpy", "click", "rich", "more", "exceptiongroup"} <= names
    assert not any("torch" in one or "onnx" in one for one in asked[0])


def test_dependencies_that_never_become_complete_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "_download", lambda *_: None)
    with pytest.raises(MtuError, match=r"still lack .*numpy") as caught:
        wheels.fetch_dependencies(tmp_path, JETPACK_6, "3.10")
    assert "--no-wheels" in str(caught.value.hint)


def test_an_unreachable_registry_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip does not even try
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        MtuError, match=r"pip cannot fetch the wheels for Python 3\.10 on manylinux_2_35_aarch64: .*"
    ) as caught:
        wheels.fetch_dependencies(tmp_path, JETPACK_6, "3.10")
    assert "No matching distribution" in caught.value.message
    assert "is the package registry reachable?" in str(caught.value.hint)


def test_without_pip_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "/usr/bin/python: No module named pip\n")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ToolchainMissing, match="pip"):
        wheels.fetch_dependencies(tmp_path, JETPACK_6, "3.10")


def test_a_pack_without_dependencies_says_so_and_how_to_install(tmp_path: Path) -> None:
    packed = wheels.pack(tmp_path / "wheels", [SYSTEM], fetch=False)
    assert packed["dependencies"] is None
    assert packed["install"] == "pip install --find-links BUNDLE/wheels mtu-compile cuda-python"
    assert [path.name for path in (tmp_path / "wheels").iterdir()] == [packed["own"]]


@pytest.mark.slow
def test_the_registry_has_all_a_jetson_needs(tmp_path: Path) -> None:
    """Downloads 90 MB: the real closure for JetPack 6 and 7 in one folder."""
    seven = System(python="3.12", glibc="2.39", packages=("cuda-python==13.0.*",))
    packed = wheels.pack(tmp_path / "wheels", [SYSTEM, seven], fetch=True)
    assert packed["install"] == "pip install --no-index --find-links BUNDLE/wheels mtu-compile cuda-python"
    names = packed["dependencies"]
    for start in ("numpy-2.2", "cuda_python-12.6", "cuda_bindings-13.0", "exceptiongroup-", "tokenizers-"):
        assert any(name.startswith(start) for name in names), start
    for system in (SYSTEM, seven):
        platforms = wheels.manylinux(system.glibc, system.machine)
        wanted = ["mtu-compile", *system.packages]
        assert wheels.closure(tmp_path / "wheels", wanted, platforms, system.python)[1] == []
