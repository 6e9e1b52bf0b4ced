"""The Intel NPU compiler of OpenVINO's Windows wheel, under Wine: for Linux machines that have none of their own.

``targets.npu.set_up`` unpacks the wheel's libraries into the user's cache folder, with ``npu_compile.c``, compiled by
MinGW, beside them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mtu_compile.core.hashing import file_sha256
from targets.npu.provider import Provider

#: What compiling takes of the wheel's ``openvino/libs``.
LIBRARIES = (
    "openvino.dll",
    "openvino_c.dll",
    "openvino_ir_frontend.dll",
    "openvino_intel_npu_plugin.dll",
    "openvino_intel_npu_compiler.dll",
    "openvino_intel_npu_compiler_loader.dll",
    "openvino_intel_npu_vm_runtime.dll",
    "tbb12.dll",
    "tbbbind_2_5.dll",
    "tbbmalloc.dll",
)

SOURCE = Path(__file__).with_name("npu_compile.c")
PROGRAM = "npu_compile.exe"
READY = "ready.json"


def provider(release: str, cache: Path) -> Provider | None:
    """The compiler that ``set_up`` left for this release, if it is all there and Wine still is."""
    folder, wine = cache / release, find_wine()
    return None if wine is None or not is_ready(folder) else provider_in(release, folder, wine)


def provider_in(release: str, folder: Path, wine: Path) -> Provider:
    return Provider(
        name="wine",
        version=release,
        how=f"OpenVINO's Windows wheel {release} under Wine ({wine})",
        command=(str(wine), str(folder / "bin" / PROGRAM)),
        environment=_environment(folder),
        traces=True,
    )


def _environment(folder: Path) -> dict[str, str]:
    return {
        "WINEPREFIX": str(folder / "prefix"),
        "WINEARCH": "win64",
        "WINEDEBUG": "-all",
        # No offers to download Mono and Gecko, no entries in the desktop's menus.
        "WINEDLLOVERRIDES": "mscoree=;mshtml=;winemenubuilder.exe=",
        "DISPLAY": "",
        "WAYLAND_DISPLAY": "",
        "LC_ALL": "C.UTF-8",
    }


def find_wine() -> Path | None:
    """A Wine that runs 64-bit programs; Debian's ``wine64`` package alone puts none on the PATH."""
    for name in ("wine64", "wine64-stable", "wine-stable", "wine"):
        if found := shutil.which(name):
            return Path(found)
    fixed = (Path("/usr/lib/wine/wine64"), Path("/opt/wine-stable/bin/wine"))
    return next((path for path in fixed if path.is_file()), None)


def is_ready(folder: Path) -> bool:
    """Whether ``set_up`` was done, with the program as it is now."""
    try:
        state = json.loads((folder / READY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    complete = all((folder / "bin" / name).is_file() for name in (*LIBRARIES, PROGRAM))
    return complete and isinstance(state, dict) and state.get("program") == file_sha256(SOURCE)
