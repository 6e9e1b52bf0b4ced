"""What a board has to have to build the engines itself, and the packages the bundle brings it."""

from __future__ import annotations

from dataclasses import dataclass

from mtu_compile.bundle.kinds import Name, Text, Version


@dataclass(frozen=True)
class JetPackRecord:
    """``targets.nvidia.jetson.JetPack``: a system a board may run.

    Attributes:
        version: first and last JetPack of the line.
        tensorrt: oldest TensorRT it brings.
        cuda, python, glibc, machine: what else it brings.
        packages: requirements that are installed there beside ours.
        source: where these come from.
    """

    version: tuple[Version, Version]
    tensorrt: Version
    cuda: Version | None = None
    python: Version | None = None
    glibc: Version | None = None
    machine: Name | None = None
    packages: tuple[Text, ...] = ()
    source: Text | None = None


@dataclass(frozen=True)
class WheelsRecord:
    """Packages in the bundle: our wheel, those it depends on (``None``: the board fetches them), and the command."""

    own: Text
    dependencies: tuple[Text, ...] | None
    install: Text


@dataclass(frozen=True)
class BoardRequirements:
    """What ``mtu-compile board build`` asks of a board: ``TargetSpec.board_requirements``.

    Attributes:
        tensorrt: oldest version that builds the engines, and the newest this was written for.
        device: the board, in its vendor's words.
        compute_capability: of its GPU.
        python: versions TensorRT's bindings there are for; none where that is not known.
        jetpack: systems the board may run.
        wheels: packages the bundle brings.
    """

    tensorrt: tuple[Version, Version]
    device: Text | None = None
    compute_capability: Version | None = None
    python: tuple[Version, ...] = ()
    jetpack: tuple[JetPackRecord, ...] = ()
    wheels: WheelsRecord | None = None
