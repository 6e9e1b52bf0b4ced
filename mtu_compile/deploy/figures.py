"""What boards measured of a bundle, kept beside it: one file a board, ``BUNDLE/built/boards/NAME.json``.

The manifest vouches for what a bundle is, and says nothing of what became of it elsewhere: so this is not part of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mtu_compile.bundle import BUILT, MANIFEST
from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.hashing import file_sha256

FOLDER = f"{BUILT}/boards"
FORMAT = "mtu-board-1"


@dataclass(frozen=True)
class BoardFigures:
    """What one board measured.

    Attributes:
        name: of the board.
        at: when this machine was told, UTC.
        facts: what the board is: model, CPU, system, drivers.
        versions: of the packages that ran it.
        measured: latency, memory and device (``board.measure.Measured``).
        accuracy: the check's (``accuracy.verdict.CheckResult``).
    """

    name: str
    at: str
    facts: Mapping[str, Any]
    versions: Mapping[str, str]
    measured: Mapping[str, Any]
    accuracy: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every task kept its thresholds there."""
        return bool(self.accuracy["passed"])


def record(root: Path, name: str, figures: Mapping[str, Any], *, folder: Path | None = None) -> Path:
    """Keep what a board measured of the bundle ``root``, in the place of what it measured before.

    Args:
        root: the bundle.
        name: of the board.
        figures: ``board.prove.check``'s, with ``facts``.
        folder: keep it there instead of beside the bundle.
    """
    folder = folder or root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "format": FORMAT,
        "manifest": file_sha256(root / MANIFEST),
        "name": name,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **{key: figures[key] for key in ("facts", "versions", "measured", "accuracy")},
    }
    path = folder / f"{name}.json"
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    return path


def read(root: Path) -> tuple[BoardFigures, ...]:
    """What boards measured of this very bundle, by name; what is of another, or damaged, is left out."""
    found = []
    identity = file_sha256(root / MANIFEST)
    for path in sorted((root / FOLDER).glob("*.json")):
        try:
            body = json.loads(path.read_bytes())
            if body.pop("format") != FORMAT or body.pop("manifest") != identity:
                continue
            one = BoardFigures(**body)
            _ = one.passed, one.measured["tasks"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        found.append(one)
    return tuple(found)
