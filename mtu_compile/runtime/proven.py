"""On which instruction sets a bundle for CPUs was proven: by the build, and by checks on the machine it lies on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mtu_compile import bundle
from mtu_compile.bundle import BUILT, InstructionSetProof, Manifest
from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import MtuError
from mtu_compile.core.hashing import file_sha256
from mtu_compile.runtime import cpu_isa

RECORD = f"{BUILT}/instruction-sets.json"
FORMAT = "mtu-proven-1"


def on_cpu(manifest: Manifest) -> bool:
    """Whether a CPU runs the bundle's UNets through OpenVINO, so that instruction sets matter."""
    refs = [entry.engine for entry in manifest.tasks.values()]
    return any(ref.kind == "openvino" and ref.config.get("device", "CPU") == "CPU" for ref in refs)


def levels(root: Path, manifest: Manifest) -> frozenset[str]:
    """The levels (``cpu_isa.LEVELS``) at which every task passed."""
    return frozenset(one.level for one in (*manifest.instruction_sets, *_recorded(root)) if not one.failures)


def warning(root: Path, manifest: Manifest) -> str | None:
    """What to tell before a bundle runs at a level it was not proven at; ``None`` if it was, or if no CPU runs it."""
    here = cpu_isa.level()
    known = levels(root, manifest) if on_cpu(manifest) else frozenset([here])
    if here in known:
        return None
    proven = ", ".join(sorted(known)) or "none"
    return (
        f"this CPU computes at instruction set {here}, and the bundle was proven at {proven}; "
        f"`mtu-compile check {root}` proves it here"
    )


def record(root: Path, proofs: Sequence[InstructionSetProof]) -> bool:
    """Keep what a check on this machine proved, beside the bundle; ``False`` where the folder cannot be written to."""
    names = {one.level for one in proofs}
    kept = [*(one for one in _recorded(root) if one.level not in names), *proofs]
    body = {"format": FORMAT, "manifest": _identity(root), "proofs": [one.to_json() for one in kept]}
    try:
        (root / BUILT).mkdir(exist_ok=True)
        with atomic_file(root / RECORD) as temporary:
            temporary.write_text(json.dumps(body, indent=2), encoding="utf-8")
    except OSError:
        return False
    return True


def _recorded(root: Path) -> tuple[InstructionSetProof, ...]:
    """What was recorded here for this very bundle; a damaged record, or another bundle's, proves nothing."""
    if not (root / RECORD).is_file():
        return ()
    try:
        body = json.loads(bundle.resolve(root, RECORD).read_bytes())
        if body["format"] != FORMAT or body["manifest"] != _identity(root):
            return ()
        return tuple(InstructionSetProof.from_json(one) for one in body["proofs"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MtuError):
        return ()


def _identity(root: Path) -> str:
    return file_sha256(root / bundle.MANIFEST)
