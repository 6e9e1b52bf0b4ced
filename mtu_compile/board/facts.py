"""What a board is, as far as Python's own library can tell: before anything is installed there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: Where systems say which version of a driver or board software they have, and what stands in that file before it.
_VERSIONS = {
    "l4t": (Path("/etc/nv_tegra_release"), r"# (R\d+) .*?REVISION: ([\d.]+)"),
    "nvidia_driver": (Path("/proc/driver/nvidia/version"), r"(?:Kernel Module|x86_64|aarch64)\s+(\d+[\d.]+)"),
    "npu_driver": (Path("/sys/module/intel_vpu/version"), r"(\S+)"),
}
_JETPACK = Path("/var/lib/dpkg/info/nvidia-jetpack.list")
_STATUS = Path("/var/lib/dpkg/status")


def gather(root: Path) -> dict[str, Any]:
    """The board as JSON data: what cannot be found out is ``None``.

    Args:
        root: of the board's versions, whose disk is asked for its free space.
    """
    return {
        "host": platform.node(),
        "model": _read(Path("/proc/device-tree/model")) or _read(Path("/sys/class/dmi/id/product_name")),
        "cpu": _cpu(),
        "machine": platform.machine(),
        "system": _system(),
        "kernel": platform.release(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "executable": sys.executable,
        "glibc": platform.libc_ver()[1] or None,
        "jetpack": _jetpack(),
        **{name: _version(*place) for name, place in _VERSIONS.items()},
        "cores": os.cpu_count(),
        "memory_bytes": _memory("MemTotal"),
        "available_bytes": _memory("MemAvailable"),
        "disk_free_bytes": shutil.disk_usage(root).free,
    }


def identity(facts: Mapping[str, Any], environment: str) -> str:
    """Hash of all that a check depends on beside the bundle: the machine, its drivers, the packages it runs with."""
    kept = ("model", "cpu", "machine", "kernel", "python", "jetpack", *_VERSIONS)
    said = {**{name: facts[name] for name in kept}, "environment": environment}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _cpu() -> str | None:
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    return match[1].strip() if match else None


def _system() -> str | None:
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(Path("/etc/os-release")) or "", re.MULTILINE)
    return match[1] if match else None


def _jetpack() -> str | None:
    """Version of the package that JetPack is; asked for only where it is installed, as the list is long."""
    if not _JETPACK.exists():
        return None
    match = re.search(r"^Package: nvidia-jetpack$(?:\n.+)*?\nVersion: (\S+)", _read(_STATUS) or "", re.MULTILINE)
    return match[1] if match else None


def _version(path: Path, pattern: str) -> str | None:
    match = re.search(pattern, _read(path) or "")
    return ".".join(match.groups()) if match else None


def _memory(name: str) -> int | None:
    match = re.search(rf"^{name}:\s+(\d+) kB$", _read(Path("/proc/meminfo")) or "", re.MULTILINE)
    return int(match[1]) * 1024 if match else None  # "kB" there are kibibytes


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n ") or None
    except OSError:
        return None
