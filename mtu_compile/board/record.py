"""What a board knows of one version of a bundle, in ``versions/<id>/record.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from mtu_compile.board import durable

FILE = "record.json"
FORMAT = "mtu-version-1"


class State(Enum):
    """How far a version got. Each is reached from the one before it, by a step that is safe to repeat.

    Only what is ``CHECKED`` can become active; whether a version *is* active, the link ``current`` alone says.
    """

    OFFERED = "offered"
    TRANSFERRED = "transferred"
    UNPACKED = "unpacked"
    INSTALLED = "installed"
    BUILT = "built"
    CHECKED = "checked"

    @property
    def rank(self) -> int:
        """Its place in the order."""
        return list(State).index(self)


@dataclass(frozen=True)
class Record:
    """One version on a board.

    Attributes:
        state: how far it got.
        source: name of the checkpoint, from the manifest.
        target, precision: likewise.
        release: of its signature; ``None`` if it is not signed.
        key: id of the key it is signed with.
        environment: id of the packages it runs with.
        on: what the board was when it was checked (``facts.identity``); another board, or another driver, checks anew.
        figures: what the check measured.
        failures: why it may not become active; none if it may, or was not checked yet.
        sequence: place in the order of activations, from 1; ``None`` if it never was active.
        before: the version that was active when this one became so; what a rollback goes back to.
    """

    state: State = State.OFFERED
    source: str = ""
    target: str = ""
    precision: str = ""
    release: int | None = None
    key: str | None = None
    environment: str | None = None
    on: str | None = None
    figures: Mapping[str, Any] | None = None
    failures: tuple[str, ...] = field(default=())
    sequence: int | None = None
    before: str | None = None

    def reached(self, state: State) -> Record:
        """This record at ``state``, at least."""
        return self if self.state.rank >= state.rank else replace(self, state=state)

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "state": self.state.value, "failures": list(self.failures)}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Record:
        """The inverse of ``to_json``; ``ValueError``, ``KeyError`` or ``TypeError`` for anything else."""
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']!r}")
        fields = {name: value for name, value in body.items() if name != "format"}
        return cls(**{**fields, "state": State(fields["state"]), "failures": tuple(fields["failures"])})


def read(folder: Path) -> Record | None:
    """The record in a version's folder; ``None`` without one that can be read: the version begins anew."""
    try:
        return Record.from_json(json.loads((folder / FILE).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write(folder: Path, record: Record) -> None:
    """Keep ``record``, all at once."""
    durable.write(folder / FILE, json.dumps(record.to_json(), indent=2).encode() + b"\n")
