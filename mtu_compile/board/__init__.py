"""What a board does with a bundle: keep its versions, build the engines that only it can build, check and switch.

No torch, no compiler. The modules that keep versions need nothing but Python's own library, as they run before anything
is installed: so this package loads what it exports when that is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtu_compile.board.build import BoardBuildResult, build_bundle
    from mtu_compile.board.check import check_bundle
    from mtu_compile.board.machine import Board, probe

_PLACES = {"BoardBuildResult": "build", "build_bundle": "build", "check_bundle": "check", "Board": "machine"}
_PLACES["probe"] = "machine"


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


__all__ = ["Board", "BoardBuildResult", "build_bundle", "check_bundle", "probe"]
