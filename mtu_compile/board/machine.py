"""What this machine is: its GPU, CUDA, TensorRT, Python and memory."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtu_compile.core.errors import TargetError
from mtu_compile.runtime.built import BUILDABLE, Fingerprint
from targets.nvidia import builder as tensorrt_builder
from targets.nvidia import cuda

#: Written by Jetson Linux, its release in the first line.
_JETSON_RELEASE = Path("/etc/nv_tegra_release")
_MODEL = Path("/proc/device-tree/model")
_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Board:
    """The machine at hand; what is not there is ``None``, with the reason in ``missing``.

    Attributes:
        model: the board's name, in the device tree's words.
        jetson_linux: first line of the Jetson Linux release, on a Jetson.
        python: "3.10".
        gpu: the CUDA device.
        tensorrt: version by kind ("tensorrt", "tensorrt-rtx").
        available_bytes: memory programs can still take, by the kernel's estimate.
        missing: reason by what is missing ("gpu", "tensorrt", "tensorrt-rtx").
    """

    model: str | None
    jetson_linux: str | None
    python: str
    gpu: cuda.Device | None
    tensorrt: Mapping[str, str]
    available_bytes: int | None
    missing: Mapping[str, TargetError]

    @property
    def free_gpu_bytes(self) -> int | None:
        """Memory the GPU can still take.

        On a Jetson, CPU and GPU share it, and CUDA does not count what the kernel would free first (CUDA for Tegra
        application note, "Estimating Total Allocatable Device Memory").
        """
        if self.gpu is None:
            return None
        shared = self.jetson_linux is not None
        return max(self.gpu.free_bytes, self.available_bytes or 0) if shared else self.gpu.free_bytes

    def fingerprint(self, kind: str) -> Fingerprint:
        """See ``runtime.built.fingerprint``; without a GPU, of the library alone. ``ToolchainMissing`` without that."""
        if kind not in self.tensorrt:
            raise self.missing[kind]
        if self.gpu is None:
            return Fingerprint(self.tensorrt[kind])
        return Fingerprint(self.tensorrt[kind], self.gpu.name, self.gpu.compute_capability, self.gpu.driver)

    def to_json(self) -> dict[str, Any]:
        missing = {name: {"reason": e.message, "hint": e.hint} for name, e in self.missing.items()}
        return {
            "model": self.model,
            "jetson_linux": self.jetson_linux,
            "python": self.python,
            "gpu": None if self.gpu is None else asdict(self.gpu),
            "free_gpu_bytes": self.free_gpu_bytes,
            "tensorrt": dict(self.tensorrt),
            "available_bytes": self.available_bytes,
            "missing": missing,
        }


def probe() -> Board:
    """Ask the machine. Never raises: what cannot be found out is ``None``."""
    missing: dict[str, TargetError] = {}
    gpu: cuda.Device | None = None
    try:
        gpu = cuda.device_info()
    except TargetError as error:
        missing["gpu"] = error
    tensorrt: dict[str, str] = {}
    for kind in BUILDABLE:
        try:
            tensorrt[kind] = tensorrt_builder.version(kind)
        except TargetError as error:
            missing[kind] = error
    release = _read(_JETSON_RELEASE)
    return Board(
        model=_read(_MODEL),
        jetson_linux=release.splitlines()[0].lstrip("# ") if release else None,
        python=".".join(platform.python_version_tuple()[:2]),
        gpu=gpu,
        tensorrt=tensorrt,
        available_bytes=_available_bytes(),
        missing=missing,
    )


def _available_bytes() -> int | None:
    for line in (_read(_MEMORY) or "").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024  # "kB" there are kibibytes
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n ") or None
    except OSError:
        return None
