"""Engines that this machine built from a bundle: ``BUNDLE/built/`` and its index.

The manifest vouches for everything in a bundle except this folder, so each engine is recorded with the hash of its own
bytes, the hash of the graph and the recipe it was built from, and the device it was built on. An engine of which any of
these does not agree is never handed out: TensorRT engines are neither portable between GPUs nor between versions, and
an engine of another device loads with a warning at best and crashes at worst.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mtu_compile import bundle
from mtu_compile.bundle import BUILT, EngineRef, Manifest, contents, vouched
from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import BundleError, TargetError
from mtu_compile.core.hashing import file_sha256
from mtu_compile.runtime.builder import Fingerprint, builder

INDEX = f"{BUILT}/index.json"
FORMAT = "mtu-built-1"

#: For whoever finds something else in a board's store than the board put there.
DEPLOY_AGAIN = "deploy it again: what is not as it was built there is built again"

#: Of a graph's folder, what is not the graph: engines and blobs made from it.
_MADE = (".engine", ".blob")


@dataclass(frozen=True)
class BuiltEngine:
    """One entry of the index.

    Attributes:
        graph: path of the graph, relative to the bundle; the entry's key.
        graph_sha256: see ``graph_sha256``.
        kind, recipe: the ``EngineRef``'s kind and config.
        engine: path of the engine, relative to the bundle.
        engine_sha256: of the engine's bytes.
        bytes: size of the engine.
        seconds: what the build took.
        toolchain: name and version of what built it.
        device: where it was built.
    """

    graph: str
    graph_sha256: str
    kind: str
    recipe: Mapping[str, str]
    engine: str
    engine_sha256: str
    bytes: int
    seconds: float
    toolchain: str
    device: Fingerprint


def graph_bytes(root: Path, manifest: Manifest, ref: EngineRef) -> int:
    """Size of a graph with the weights it reads."""
    return contents.bytes_of(root, _graph_files(manifest, ref)) + (ref.weights_bytes or 0)


def graph_sha256(manifest: Manifest, ref: EngineRef) -> str:
    """SHA-256 over a graph and the files of its weights, as the manifest has them: lines ``<sha256>  <path>``."""
    shared = () if ref.weights is None else (ref.weights,)
    names = sorted((*_graph_files(manifest, ref), *shared))
    return hashlib.sha256("".join(f"{manifest.files[name]}  {name}\n" for name in names).encode()).hexdigest()


def _graph_files(manifest: Manifest, ref: EngineRef) -> tuple[str, ...]:
    """The graph and the weights beside it, without what was made from them."""
    return tuple(name for name in contents.graph_files(manifest, ref) if not name.endswith(_MADE))


def engine_name(path: str) -> str:
    """Where the engine of the graph ``path`` lies: ``"unet_edit/model.onnx"`` → ``"built/unet_edit.engine"``."""
    pure = PurePosixPath(path)
    parts = pure.parts[:-1] if len(pure.parts) > 1 and pure.stem == "model" else (*pure.parts[:-1], pure.stem)
    return f"{BUILT}/{'.'.join(parts)}.engine"


def find(root: Path, manifest: Manifest, ref: EngineRef, device: Fingerprint | None = None) -> Path | None:
    """The engine built here for ``ref``; ``None`` if none was built.

    Args:
        root: the bundle.
        manifest: its manifest.
        ref: the network.
        device: what the engine has to run on; asked of this machine if not given, and only if there is an engine.

    Raises:
        BundleError: the index or the engine is damaged, or was built from another graph or recipe.
        TargetError: the engine was built on another device or with another version of its library; or there is no
            device here.
        ToolchainMissing: the vendor's library, or what asks for its device, is not installed.
    """
    entry = read_index(root).get(ref.path)
    if entry is None:
        return None
    if problem := damage(root, manifest, ref, entry):
        raise BundleError(f"{entry.engine} is not used: {problem}", hint=_hint(root))
    known = vouched.read(root)
    if known is not None and known.get(entry.engine) != entry.engine_sha256:
        raise BundleError(f"{entry.engine} is not used: it is none of those this board proved", hint=DEPLOY_AGAIN)
    if problem := foreign(entry, device or builder(ref.kind).fingerprint(ref.kind)):
        raise TargetError(f"{entry.engine} is not used: {problem}", hint=_hint(root))
    return bundle.resolve(root, entry.engine)


def cache(root: Path) -> Path | None:
    """Where a vendor's runtime may keep what it compiles; ``None`` where something lies there that cannot be removed.

    What it kept is run without another look, so where a board vouches for what it has, all else is thrown away.
    """
    try:
        for path in vouched.foreign(root):
            if not path.name.endswith(".engine"):
                path.unlink()
    except OSError:
        return None
    return root / BUILT


def damage(root: Path, manifest: Manifest, ref: EngineRef, entry: BuiltEngine) -> str | None:
    """Why the file of ``entry`` is not the engine of ``ref``; ``None`` if it is, byte for byte."""
    if entry.graph_sha256 != graph_sha256(manifest, ref):
        return f"it was built from another {ref.path}"
    if (entry.kind, dict(entry.recipe)) != (ref.kind, dict(ref.config)):
        return "it was built with another recipe"
    try:
        path = bundle.resolve(root, entry.engine)
    except BundleError:
        return "the file is missing"
    if path.stat().st_size != entry.bytes or file_sha256(path) != entry.engine_sha256:
        return "the file is not the one that was built"
    return None


def foreign(entry: BuiltEngine, device: Fingerprint) -> str | None:
    """Why an intact engine does not belong to ``device``; ``None`` if it does."""
    return entry.device.foreign(entry.kind, entry.recipe, device)


def read_index(root: Path) -> dict[str, BuiltEngine]:
    """What was built here, by graph; empty if nothing was. ``BundleError`` if the index is damaged."""
    path = root / INDEX
    if not path.exists() and not path.is_symlink():
        return {}
    try:
        raw = json.loads(bundle.resolve(root, INDEX).read_bytes())
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}")
        return {graph: _entry(graph, entry) for graph, entry in raw["engines"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{INDEX} is damaged: {error}", hint=_hint(root)) from error


def record(root: Path, entry: BuiltEngine) -> None:
    """Add ``entry`` to the index, in the place of an earlier one of the same graph; a damaged index is begun anew."""
    try:
        entries = read_index(root)
    except BundleError:
        entries = {}
    entries[entry.graph] = entry
    body = {"format": FORMAT, "engines": {graph: asdict(one) for graph, one in sorted(entries.items())}}
    (root / BUILT).mkdir(exist_ok=True)
    with atomic_file(root / INDEX) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(body, file, indent=2)
        file.flush()
        os.fsync(file.fileno())  # boards lose power: the rename must not come before the bytes


def _entry(graph: str, raw: Mapping[str, Any]) -> BuiltEngine:
    entry = BuiltEngine(**{**raw, "device": builder(raw["kind"]).read_fingerprint(raw["device"])})
    if entry.graph != graph or entry.engine != engine_name(graph):
        raise ValueError(f"{graph!r} names {entry.engine!r}")
    return entry


def _hint(root: Path) -> str:
    return f"mtu-compile board build {root}"
