"""Builds a bundle's engines on the machine they will run on.

The engines are built one after the other, and each is recorded in ``BUNDLE/built/index.json`` as soon as it is whole:
an interrupted build goes on where it stopped, and an engine that is broken, or was built for something else, is built
again and never loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mtu_compile import bundle
from mtu_compile.board.machine import Board, probe
from mtu_compile.bundle import BUILT, EngineRef, Manifest
from mtu_compile.core.claims import sweep_folder
from mtu_compile.core.errors import BundleError, ConfigError, MtuError, TargetError
from mtu_compile.core.hashing import file_sha256
from mtu_compile.core.progress import Advance, Progress
from mtu_compile.runtime import built
from mtu_compile.runtime.built import BuiltEngine
from targets.nvidia.builder import Recipe, build_engine

#: Peak memory of a build, as a multiple of the graph's size: 3.4 GB for an SD 1.5-sized INT8 graph of 0.86 GB
#: (TensorRT-RTX 1.7, no GPU). Not measured on a Jetson.
PEAK_FACTOR = 4.0

#: Size of an engine, as a multiple of its graph's: 905 MB from 861 MB in the same build, rounded up.
ENGINE_FACTOR = 1.1

#: What TensorRT keeps of earlier builds' timings.
TIMING_CACHE = "timing.cache"
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
    path: Path, *, force: bool = False, ignore_memory: bool = False, progress: Progress | None = None
) -> BoardBuildResult:
    """Build every engine of a bundle that is not built here yet.

    Args:
        path: the bundle.
        force: build anew what is built, and what the bundle brings prebuilt.
        ignore_memory: go on where the estimate says that memory or disk are too small.
        progress: told of every engine, and of the builder's steps.

    Raises:
        BundleError: the bundle is damaged.
        ToolchainMissing: TensorRT, or for a build that needs the GPU cuda-python, is not installed.
        TargetError: nothing of the bundle is built on a board; another GPU or an older TensorRT than it needs; too
            little memory or disk.
        BuildError: TensorRT refuses a graph. Engines built before are kept.
        MtuError: another build of the same bundle is running.
    """
    progress = progress or Progress()
    root = path.resolve()
    with progress.stage("verify"):
        manifest = bundle.read(root)
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
        size = sum((root / name).stat().st_size for name in built.graph_files(manifest, ref.path))
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
    for where, ref in manifest.engines():
        if ref.kind not in built.BUILDABLE:
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
    for kind in dict.fromkeys(ref.kind for ref in refs):
        if kind in board.missing:
            raise board.missing[kind]
    for ref in refs:
        if not built.named_gpus(ref.kind, ref.config):
            _check_gpu(manifest, ref, board)
    return _check_versions(manifest.extra.get("board") or {}, {ref.kind for ref in refs}, board)


def _check_gpu(manifest: Manifest, ref: EngineRef, board: Board) -> None:
    if board.gpu is None:
        raise board.missing["gpu"]
    wanted = Recipe.from_config(ref.config).compute_capabilities
    if wanted and board.gpu.compute_capability not in wanted:
        raise TargetError(
            f"this bundle is for {manifest.target}, compute capability {', '.join(wanted)}, and the GPU here, "
            f"{board.gpu.name}, has {board.gpu.compute_capability}",
            hint="build the bundle for this device: mtu-compile targets lists them",
        )


def _check_versions(requirements: Mapping[str, Any], kinds: set[str], board: Board) -> tuple[str, ...]:
    """``requirements`` are those of the manifest: what the target says a board has to have."""
    if "tensorrt" not in kinds or not requirements:
        return ()
    notes = []
    have = board.tensorrt["tensorrt"]
    oldest, newest = requirements["tensorrt"]
    if _version(have) < _version(oldest):
        raise TargetError(
            f"this bundle needs TensorRT {oldest} or newer, and here is {have}",
            hint="update JetPack: " + "; ".join(_describe(line) for line in requirements.get("jetpack", ())),
        )
    if _version(have)[:2] > _version(newest):
        notes.append(f"TensorRT {have} is newer than {newest}, the newest this was written for")
    if board.python not in requirements.get("python", [board.python]):
        known = " and ".join(requirements["python"])
        notes.append(f"Python {board.python} is none of JetPack's ({known}); TensorRT's own bindings are for those")
    return tuple(notes)


def _describe(line: Mapping[str, Any]) -> str:
    first, last = line["version"]
    return f"{first} to {last} bring TensorRT {line['tensorrt']} or newer"


def check_space(root: Path, wanted: list[PlannedEngine], board: Board) -> None:
    """``TargetError`` if memory or disk are smaller than the builds are estimated to need."""
    if not wanted:
        return
    largest = max(wanted, key=lambda one: one.graph_bytes)
    need = int(largest.graph_bytes * PEAK_FACTOR)
    have = board.available_bytes
    if have is not None and have < need:
        raise TargetError(
            f"building {largest.ref.path} takes about {_gb(need)} of memory (an estimate: {PEAK_FACTOR:g} times the "
            f"graph), and {_gb(have)} are free",
            hint="close other programs, stop the desktop (sudo init 3) or add swap; --ignore-memory tries all the same",
        )
    free, engine = board.free_gpu_bytes, int(largest.graph_bytes * ENGINE_FACTOR)
    if free is not None and free < engine:
        raise TargetError(
            f"the engine of {largest.ref.path} takes at least {_gb(engine)} of the GPU's memory (an estimate), and "
            f"{_gb(free)} are free",
            hint="end what else runs on the GPU; --ignore-memory tries all the same",
        )
    disk, engines = shutil.disk_usage(root).free, int(sum(one.graph_bytes for one in wanted) * ENGINE_FACTOR)
    if disk < engines:
        raise TargetError(
            f"the engines take about {_gb(engines)} (an estimate), and {_gb(disk)} of the disk are free",
            hint="free some space; --ignore-memory tries all the same",
        )


def _build(root: Path, manifest: Manifest, ref: EngineRef, board: Board, advance: Advance) -> BuiltEngine:
    name = built.engine_name(ref.path)
    made = build_engine(
        bundle.resolve(root, ref.path),
        root / name,
        Recipe.from_config(ref.config),
        kind=ref.kind,
        timing_cache=root / BUILT / TIMING_CACHE,
        advance=advance,
    )
    entry = BuiltEngine(
        graph=ref.path,
        graph_sha256=built.graph_sha256(manifest, ref.path),
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


def _version(text: str) -> tuple[int, ...]:
    """``"10.3.0.26"`` → ``(10, 3, 0, 26)``; what follows the numbers is left out."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    if not numbers:
        raise ConfigError(f"{text!r} is not a version")
    return tuple(numbers)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
