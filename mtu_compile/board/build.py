"""Builds a bundle's engines on the machine they will run on.

The engines are built one after the other, and each is recorded in ``BUNDLE/built/index.json`` as soon as it is whole:
an interrupted build goes on where it stopped, and an engine that is broken, or was built for something else, is built
again and never loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mtu_compile import bundle
from mtu_compile.board.machine import Board, probe
from mtu_compile.bundle import BUILT, EngineRef, Manifest
from mtu_compile.bundle.keys import PublicKey
from mtu_compile.core import vendors
from mtu_compile.core.amounts import readable
from mtu_compile.core.claims import sweep_folder
from mtu_compile.core.errors import BundleError, MtuError, TargetError
from mtu_compile.core.hashing import file_sha256
from mtu_compile.core.progress import Advance, Progress
from mtu_compile.runtime import built
from mtu_compile.runtime.builder import builder
from mtu_compile.runtime.built import BuiltEngine

_LOCK = "lock"


@dataclass(frozen=True)
class PlannedEngine:
    """One engine a bundle needs on this machine.

    Attributes:
        ref: the network.
        graph_bytes: size of the graph with its weights.
        state: "built", "to be built", or "prebuilt" where the bundle brings the engine.
        why: why an engine that is there has to be built again; empty otherwise.
        built: what is built.
    """

    ref: EngineRef
    graph_bytes: int
    state: str
    why: str = ""
    built: BuiltEngine | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "graph": self.ref.path,
            "kind": self.ref.kind,
            "graph_bytes": self.graph_bytes,
            "state": self.state,
            "why": self.why,
            "built": None if self.built is None else asdict(self.built),
        }


@dataclass(frozen=True)
class BoardBuildResult:
    """What ``build_bundle`` did.

    Attributes:
        engines: every engine of the bundle that is built on a board, old and new.
        reused: graphs whose engine was there already.
        notes: what is worth knowing and stopped nothing.
    """

    engines: tuple[BuiltEngine, ...]
    reused: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "engines": [{**asdict(one), "reused": one.graph in self.reused} for one in self.engines],
            "notes": list(self.notes),
        }


def build_bundle(
    path: Path,
    *,
    force: bool = False,
    ignore_memory: bool = False,
    trusted: Sequence[PublicKey] | None = None,
    progress: Progress | None = None,
) -> BoardBuildResult:
    """Build every engine of a bundle that is not built here yet.

    Args:
        path: the bundle.
        force: build anew what is built, and what the bundle brings prebuilt.
        ignore_memory: go on where the estimate says that memory or disk are too small.
        trusted: demand a signature by one of these keys before anything of the bundle is read.
        progress: told of every engine, and of the builder's steps.

    Raises:
        BundleError: the bundle is damaged, or not signed by anybody trusted.
        ToolchainMissing: the vendor's library, or what asks for its device, is not installed.
        TargetError: nothing of the bundle is built on a board; another device or an older library than it needs; too
            little memory or disk.
        BuildError: the library refuses a graph. Engines built before are kept.
        MtuError: another build of the same bundle is running.
    """
    progress = progress or Progress()
    root = path.resolve()
    with progress.stage("verify"):
        manifest = bundle.read(root, trusted=trusted)
    board = probe()
    notes = check_board(manifest, board)
    (root / BUILT).mkdir(exist_ok=True)
    with _locked(root / BUILT):
        with progress.stage("what is built"):
            planned = plan(root, manifest, board)
        wanted = [p for p in planned if p.state == "to be built" or force]
        if not ignore_memory:
            check_space(root, wanted, board)
        made: dict[str, BuiltEngine] = {}
        for one in wanted:
            with progress.stage(f"build {one.ref.path}") as advance:
                made[one.ref.path] = _build(root, manifest, one.ref, board, advance)
    kept = {p.ref.path: p.built for p in planned if p.built is not None and p.ref.path not in made}
    order = [p.ref.path for p in planned]
    engines = tuple(sorted((*kept.values(), *made.values()), key=lambda entry: order.index(entry.graph)))
    return BoardBuildResult(engines, tuple(kept), notes)


def plan(root: Path, manifest: Manifest, board: Board) -> tuple[PlannedEngine, ...]:
    """State of every engine that a board builds, each graph once, in the manifest's order.

    Raises:
        BundleError: one graph is named with two recipes.
        ToolchainMissing: the library that builds them is not here.
    """
    try:
        index = built.read_index(root)
    except BundleError:
        index = {}  # nothing in it can be trusted: everything is built again
    planned = []
    for ref in buildable(manifest):
        size = built.graph_bytes(root, manifest, ref)
        entry = index.get(ref.path)
        one = PlannedEngine(ref, size, "prebuilt" if ref.prebuilt else "to be built")
        if entry is not None:
            why = built.damage(root, manifest, ref, entry) or built.foreign(entry, board.fingerprint(ref.kind))
            if why is None:
                one = replace(one, state="built", built=entry)
            else:
                one = replace(one, why=f"{entry.engine}: {why}")
        planned.append(one)
    return tuple(planned)


def buildable(manifest: Manifest) -> tuple[EngineRef, ...]:
    """The bundle's networks that a board builds, each graph once."""
    refs: dict[str, EngineRef] = {}
    kinds = vendors.builders()
    for where, ref in manifest.engines():
        if ref.kind not in kinds:
            continue
        known = refs.setdefault(ref.path, ref)
        if (known.kind, dict(known.config)) != (ref.kind, dict(ref.config)):
            raise BundleError(f"{where} and another entry build {ref.path} with different recipes")
    return tuple(refs.values())


def check_board(manifest: Manifest, board: Board) -> tuple[str, ...]:
    """Refuse a board that the bundle was not made for.

    Returns:
        Notes on what is unusual, and stops nothing.

    Raises:
        ToolchainMissing, TargetError: see ``build_bundle``.
    """
    refs = buildable(manifest)
    if not refs:
        kinds = ", ".join(sorted({ref.kind for _, ref in manifest.engines()}))
        raise TargetError(
            f"nothing of this bundle is built on a board: it is for {manifest.target}, and its networks are {kinds}",
            hint="run it as it is: mtu-compile run BUNDLE",
        )
    return board.check(manifest.target, refs, manifest.provenance.board)


def check_space(root: Path, wanted: list[PlannedEngine], board: Board) -> None:
    """``TargetError`` if memory or disk are smaller than the builds are estimated to need."""
    if not wanted:
        return
    largest = max(wanted, key=lambda one: one.graph_bytes)
    maker, machine = builder(largest.ref.kind), board.machines[largest.ref.kind]
    need = int(largest.graph_bytes * maker.peak_factor)
    have = board.host.available_bytes
    if have is not None and have < need:
        raise TargetError(
            f"building {largest.ref.path} takes about {readable(need)} of memory (an estimate: {maker.peak_factor:g} "
            f"times the graph), and {readable(have)} are free",
            hint="close other programs, stop the desktop (sudo init 3) or add swap; --ignore-memory tries all the same",
        )
    free, engine = machine.free_bytes, int(largest.graph_bytes * maker.engine_factor)
    if free is not None and free < engine:
        raise TargetError(
            f"the engine of {largest.ref.path} takes at least {readable(engine)} of the {machine.device}'s memory (an "
            f"estimate), and {readable(free)} are free",
            hint=f"end what else runs on the {machine.device}; --ignore-memory tries all the same",
        )
    disk = shutil.disk_usage(root).free
    engines = int(sum(one.graph_bytes * builder(one.ref.kind).engine_factor for one in wanted))
    if disk < engines:
        raise TargetError(
            f"the engines take about {readable(engines)} (an estimate), and {readable(disk)} of the disk are free",
            hint="free some space; --ignore-memory tries all the same",
        )


def _build(root: Path, manifest: Manifest, ref: EngineRef, board: Board, advance: Advance) -> BuiltEngine:
    name = built.engine_name(ref.path)
    graph, folder = bundle.resolve(root, ref.path), root / BUILT
    made = builder(ref.kind).build(graph, root / name, ref.config, kind=ref.kind, folder=folder, advance=advance)
    entry = BuiltEngine(
        graph=ref.path,
        graph_sha256=built.graph_sha256(manifest, ref),
        kind=ref.kind,
        recipe=dict(ref.config),
        engine=name,
        engine_sha256=file_sha256(made.path),
        bytes=made.path.stat().st_size,
        seconds=round(made.seconds, 3),
        toolchain=made.toolchain,
        device=board.fingerprint(ref.kind),
    )
    built.record(root, entry)
    return entry


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time; what a killed one left half-written is removed."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise MtuError(
                f"another build of this bundle is running in {folder}", hint="wait for it, or end it"
            ) from error
        sweep_folder(folder)
        yield
