"""Ways to run Intel's NPU compiler on this machine, and where what they need is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mtu_compile.core.errors import ToolchainMissing

#: Versions of OpenVINO whose compiler is known to take the options that write the schedule.
KNOWN = ("2026.4.1",)


@dataclass(frozen=True)
class Provider:
    """A way to run the compiler on this machine.

    Attributes:
        name: ``"native"`` or ``"wine"``.
        version: the OpenVINO it comes with ("2026.4.1").
        how: in words.
        command: what is run, followed by MODEL.xml OUT.blob KEY=VALUE….
        environment: set on top of this process's own.
        traces: it takes the options that make it write the schedule it estimated.
    """

    name: str
    version: str
    how: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    traces: bool


def openvino_release() -> str:
    """Version of the installed openvino, without its build number.

    Raises:
        ToolchainMissing: it is not installed.
    """
    try:
        return version("openvino").split("-")[0].split("+")[0]
    except PackageNotFoundError as error:
        raise ToolchainMissing("openvino is not installed", hint="pip install 'mtu-compile[openvino]'") from error


def cache_folder() -> Path:
    """Where a set-up compiler is kept: ``mtu-compile/npu`` in the user's cache folder (XDG)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "mtu-compile" / "npu"


def native(release: str) -> Provider | None:
    """The compiler library in the folder of OpenVINO's plugins, where the plugin loads it from."""
    folder = plugin_folder()
    prefix, suffix = ("", ".dll") if sys.platform == "win32" else ("lib", ".so")
    library = f"{prefix}openvino_intel_npu_compiler{suffix}"
    if folder is None or not (folder / library).is_file():
        return None
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    return Provider(
        name="native",
        version=release,
        how=f"{library} of openvino {release}",
        # A process of its own, so that its log can be read, and it can be stopped.
        command=(sys.executable, "-m", "targets.npu.worker"),
        environment={"PYTHONPATH": paths},
        traces=release in KNOWN,
    )


def plugin_folder() -> Path | None:
    """Where the installed openvino has its plugins."""
    try:
        import openvino
    except ImportError:
        return None
    folder = Path(openvino.__file__).parent / "libs"
    return folder if folder.is_dir() else None
