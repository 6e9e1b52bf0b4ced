"""Sets up the Windows wheel's NPU compiler under Wine, once for each version of OpenVINO; see ``targets.npu.wine``."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import BuildError, ConfigError, ToolchainMissing
from mtu_compile.core.hashing import file_sha256
from targets.npu.compiler import Blob, compile_blob
from targets.npu.provider import Provider, cache_folder, native, openvino_release
from targets.npu.wine import LIBRARIES, PROGRAM, READY, SOURCE, find_wine, is_ready, provider_in

#: OpenVINO's Windows wheels (CPython 3.11) that are known, by version, with the SHA-256 PyPI publishes. Others are not
#: run: Wine keeps nothing from the files of the user it runs as.
WHEELS: Mapping[str, str] = {
    "2026.4.1": "bfddae6d6d3ad240157b946f180c33d0ddfaaae7487995d929a4e6b4bc12b283",
}

#: Debian's and Ubuntu's packages for the Wine provider.
PACKAGES = ("wine64", "gcc-mingw-w64-x86-64")


def set_up(
    *,
    cache: Path | None = None,
    wheel: Path | None = None,
    sha256: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Provider:
    """Make the Windows wheel's compiler runnable here; does only what is still to be done.

    Args:
        cache: where to put it, or ``None`` for ``cache_folder()``.
        wheel: OpenVINO's Windows wheel, if it was downloaded already.
        sha256: the wheel's, for a version that is not among ``WHEELS``; it is the caller's word that it is Intel's.
        say: told each step.

    Raises:
        ToolchainMissing: a system package is missing and cannot be installed without being root.
        ConfigError: the installed openvino is of a version whose wheel is not known.
        BuildError: a download, the C compiler or the trial failed, or the wheel is not the one it has to be.
    """
    release = openvino_release()
    if (found := native(release)) is not None:
        say(f"nothing to set up: {found.how}")
        return found
    if sys.platform != "linux":
        raise ToolchainMissing(
            f"openvino {release} came without openvino_intel_npu_compiler, and Wine is only set up on Linux",
            hint="on Windows: pip install --force-reinstall openvino",
        )
    expected = (sha256 or WHEELS.get(release, "")).lower()
    if not expected:
        raise ConfigError(
            f"the Windows wheel of openvino {release} is not known to mtu-compile, so it is not run",
            hint=f"install openvino {' or '.join(WHEELS)}, or give --sha256 with the hash PyPI publishes for "
            f"openvino-{release}-*-cp311-cp311-win_amd64.whl",
        )
    wine, gcc = _system_packages(say)
    folder = (cache or cache_folder()) / release
    with _only_one(folder):
        if not is_ready(folder):
            (folder / READY).unlink(missing_ok=True)
            wheel = _verified(wheel, expected) if wheel else _download(release, expected, folder, say)
            say(f"unpacking and compiling {SOURCE.name}")
            _unpack(wheel, folder)
            _build_program(gcc, wheel, folder)
            say("trying it on a small model")
            blob = try_out(provider_in(release, folder, wine))
            state = {"wheel": expected, "program": file_sha256(SOURCE), "compiler": blob.report.compiler or ""}
            with atomic_file(folder / READY) as temporary:
                temporary.write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(folder / "wheel", ignore_errors=True)
    found = provider_in(release, folder, wine)
    say(f"ready: {found.how}, in {folder}")
    return found


def try_out(provider: Provider) -> Blob:
    """Compile a convolution of a 16×16 picture, to see that the whole chain works."""
    import numpy as np
    import openvino
    from openvino import opset13 as ops

    picture = ops.parameter([1, 16, 16, 16], np.float32, name="picture")
    weights = ops.constant(np.full((16, 16, 3, 3), 0.01, np.float32))
    convolution = ops.convolution(picture, weights, [1, 1], [1, 1], [1, 1], [1, 1])
    with tempfile.TemporaryDirectory(prefix="mtu-npu-") as name:
        xml = Path(name) / "trial" / "model.xml"
        xml.parent.mkdir()
        openvino.save_model(openvino.Model([convolution], [picture], "trial"), xml)
        return compile_blob(xml, xml.with_suffix(".blob"), platform="4000", provider=provider, timeout=600)


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two set-ups at once would unpack over each other."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _system_packages(say: Callable[[str], None]) -> tuple[Path, Path]:
    """Paths of Wine and of MinGW's C compiler; installs Debian's packages when root."""
    wine, gcc = find_wine(), shutil.which("x86_64-w64-mingw32-gcc")
    command = f"apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
    if wine is None or gcc is None:
        missing = PACKAGES[0] if wine is None else PACKAGES[1]
        apt = shutil.which("apt-get")
        if apt is None or os.geteuid() != 0:
            raise ToolchainMissing(f"{missing} is not installed", hint=f"sudo {command}")
        # A machine that never asked for a package has no list of them: then once more, with the list.
        for step in (command, "apt-get update", command):
            say(step)
            done = subprocess.run(step.split(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
            if done.returncode == 0 and step == command:
                break
        wine, gcc = find_wine(), shutil.which("x86_64-w64-mingw32-gcc")
        if wine is None or gcc is None:
            raise ToolchainMissing(
                f"apt-get could not install {missing}: {_last(done.stderr or done.stdout)}",
                hint=f"sudo apt-get update && sudo {command}",
            )
    return wine, Path(gcc)


def _download(release: str, expected: str, folder: Path, say: Callable[[str], None]) -> Path:
    """OpenVINO's Windows wheel from the package index pip is configured for; verified."""
    place = folder / "wheel"
    for wheel in sorted(place.glob("openvino-*-win_amd64.whl")):
        with contextlib.suppress(BuildError):
            return _verified(wheel, expected)
        wheel.unlink()  # of a download that was cut short
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--platform", "win_amd64", "--python-version", "3.11", "--dest", str(place), f"openvino=={release}"]
    say(f"downloading the Windows wheel of openvino {release} (85 MB)")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    found = sorted(place.glob("openvino-*-win_amd64.whl"))
    if done.returncode != 0 or not found:
        raise BuildError(
            f"pip could not download the Windows wheel of openvino {release}: {_last(done.stderr)}",
            hint="download it elsewhere and give it with --wheel FILE",
        )
    return _verified(found[0], expected)


def _verified(wheel: Path, expected: str) -> Path:
    if not wheel.is_file():
        raise ConfigError(f"there is no wheel {wheel}")
    found = file_sha256(wheel)
    if found != expected:
        raise BuildError(
            f"{wheel.name} has SHA-256 {found}, not {expected}; it is not run",
            hint="download it again; if it comes out the same, do not trust where it came from",
        )
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    """The wheel's libraries; each appears whole or not at all."""
    target = folder / "bin"
    target.mkdir(exist_ok=True)
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in LIBRARIES:
                with atomic_file(target / name) as whole, archive.open(f"openvino/libs/{name}") as packed:
                    whole.write_bytes(packed.read())
    except (KeyError, zipfile.BadZipFile) as error:
        raise BuildError(f"{wheel.name} is not a wheel with an NPU compiler: {error}") from error


def _build_program(gcc: Path, wheel: Path, folder: Path) -> None:
    """Compile ``npu_compile.c`` against the wheel's own headers and import library."""
    with tempfile.TemporaryDirectory(prefix="mtu-npu-") as name, zipfile.ZipFile(wheel) as archive:
        headers = [m for m in archive.namelist() if m.startswith("openvino/include/openvino/c/") and m.endswith(".h")]
        library = "openvino/libs/openvino_c.lib"
        archive.extractall(name, [*headers, library])
        with atomic_file(folder / "bin" / PROGRAM) as temporary:
            command = [str(gcc), "-O1", "-Wall", "-I", f"{name}/openvino/include", str(SOURCE), "-o", str(temporary)]
            done = subprocess.run(
                [*command, f"{name}/{library}"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise BuildError(f"{gcc.name} cannot compile {SOURCE.name}: {_last(done.stderr)}")


def _last(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["it said nothing"])[-1]
