"""mtu-compile: multi-task upcycled diffusion UNets, compiled for edge devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtu_compile.compile import BuildOptions, BuildResult, build

__version__ = "0.1.0"
__all__ = ["BuildOptions", "BuildResult", "__version__", "build"]


def __getattr__(name: str) -> Any:
    """The compiler's names, imported when they are asked for: the passes import this package, not its compiler."""
    if name in ("BuildOptions", "BuildResult", "build"):
        from mtu_compile import compile as compiler

        return getattr(compiler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
