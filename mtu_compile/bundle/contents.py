"""Which files of a bundle belong to which network."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from mtu_compile.bundle.engine import EngineRef
from mtu_compile.bundle.files import resolve
from mtu_compile.bundle.manifest import Manifest


def graph_files(manifest: Manifest, ref: EngineRef) -> tuple[str, ...]:
    """The graph of a network, what lies beside it under its name, and what was built from it; sorted.

    Without the file of weights that it shares with others (``EngineRef.weights``).
    """
    graph = PurePosixPath(ref.path)
    beside = {
        name
        for name in manifest.files
        if PurePosixPath(name).parent == graph.parent and PurePosixPath(name).name.startswith(f"{graph.stem}.")
    }
    built = set() if ref.prebuilt is None else {ref.prebuilt}
    return tuple(sorted((beside | built) - {ref.weights}))


def shared_weights(manifest: Manifest) -> dict[str, tuple[EngineRef, ...]]:
    """By file of weights that networks share: those networks, each once."""
    found: dict[str, dict[str, EngineRef]] = {}
    for _, ref in manifest.engines():
        if ref.weights is not None:
            found.setdefault(ref.weights, {})[ref.path] = ref
    return {name: tuple(refs.values()) for name, refs in found.items()}


def bytes_of(root: Path, names: tuple[str, ...]) -> int:
    """Size of files of the bundle ``root``."""
    return sum(resolve(root, name).stat().st_size for name in names)
