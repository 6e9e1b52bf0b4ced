"""Something that runs a graph on the machine that builds, so that backends can be compared with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mtu_compile.runtime.engine import Engine


@dataclass(frozen=True)
class Backend:
    """Something that can run the graph.

    Attributes:
        name: what it is, with device and float type (``"OpenVINO CPU, f32"``).
        version: of the package that runs it.
        open: opens it; ``TargetError`` where this machine cannot run the graph with it.
        judged: whether it has to agree with the first backend. An engine of lower precision than the graph's own types
            need not; the accuracy gate judges it.
        leads: the others are compared with it, as it computes what the ONNX file says, node by node.
    """

    name: str
    version: str
    open: Callable[[], Engine]
    judged: bool = True
    leads: bool = False


#: What a vendor offers in its ``VENDOR.backends``: given a graph (ONNX file or IR) and the kind of engine it is built
#: for if that runs on this machine's own CPU, a backend, or ``None`` for a graph it does not read.
Offer = Callable[[Path, str | None], Backend | None]


def installed(package: str) -> str:
    """Version of a package, or that it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
