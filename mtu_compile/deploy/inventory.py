"""Boards by name: where they are, what they are for, and in which order they are deployed to."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from mtu_compile.board.limits import Limits
from mtu_compile.bundle.kinds import Name, Text
from mtu_compile.core.errors import ConfigError
from mtu_compile.core.schema import Mismatch, Range, conform

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_HINT = "docs/deploy.md shows an inventory"

#: Where a board keeps its versions, below the home of whom one logs in as.
ROOT = "~/.local/share/mtu-compile"

Port = Annotated[int, Range(1, 65535)]


@dataclass(frozen=True)
class Place:
    """One board.

    Attributes:
        host: name or address, or a ``Host`` of the user's ssh_config.
        user, port: ``None`` leaves them to ssh_config.
        target: what bundles for it are compiled for; ``None`` takes any.
        root: where it keeps its versions.
        python: what runs there.
        labels: what it is picked by.
        limits: how slow and how large a version may be there.
    """

    host: Text
    user: Text | None = None
    port: Port | None = None
    target: Name | None = None
    root: Text = ROOT
    python: Text = "python3"
    labels: Mapping[str, Text] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Inventory:
    """Boards by name.

    Attributes:
        boards: in the file's order.
        canary: the board that is deployed to first, and alone.
        parallel: how many are deployed to at a time.
    """

    boards: Mapping[str, Place]
    canary: str | None = None
    parallel: int = 4


@dataclass(frozen=True)
class _File:
    boards: Mapping[str, Mapping[str, Any]]
    canary: Text | None = None
    parallel: Annotated[int, Range(1, 256)] = 4
    defaults: Mapping[str, Any] = field(default_factory=dict)


def read(path: Path) -> Inventory:
    """The inventory in a TOML file.

    Raises:
        ConfigError: there is none, it is no TOML, or an entry is not what it should be, with its name.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no inventory in {str(path)!r}: {error.strerror}", hint=_HINT) from error
    except ValueError as error:  # of TOML, and of UTF-8
        raise ConfigError(f"{path} is not TOML: {error}", hint=_HINT) from error
    try:
        body = conform(_File, raw)
        boards = {}
        for name, entry in body.boards.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
                raise ConfigError(f"{path}: {name!r} is no name of a board", hint="letters, digits and '._-'")
            boards[name] = _place({**body.defaults, **entry}, f"boards.{name}")
    except Mismatch as mismatch:
        raise mismatch.at(str(path), error=ConfigError, hint=_HINT) from mismatch
    if not boards:
        raise ConfigError(f"{path} lists no boards", hint=_HINT)
    if body.canary is not None and body.canary not in boards:
        raise ConfigError(f"{path}: the canary {body.canary!r} is none of the boards", hint=_HINT)
    return Inventory(boards, body.canary, body.parallel)


def _place(entry: Mapping[str, Any], where: str) -> Place:
    if unknown := sorted(entry.keys() - {one.name for one in fields(Place)}):
        raise ConfigError(f"{where} has an entry {unknown[0]!r}, which is not known", hint=_HINT)
    try:
        place = conform(Place, dict(entry))
    except Mismatch as mismatch:
        raise mismatch.at(where, error=ConfigError, hint=_HINT) from mismatch
    assert isinstance(place, Place)
    _check(place.host, where)
    return place


def _check(host: str, where: str) -> None:
    """A name that SSH could take for an option is none."""
    if not re.fullmatch(r"[A-Za-z0-9_.:%\[][A-Za-z0-9_.:%\[\]-]*", host):
        raise ConfigError(f"{where}: {host!r} is no host", hint="a name or an address")


def parse(destination: str, root: str = ROOT) -> tuple[str, Place]:
    """Name and place of ``[USER@]HOST[:PORT]``; an IPv6 address with a port stands in brackets.

    Raises:
        ConfigError: it is something else.
    """
    user, at, rest = destination.rpartition("@")
    match = re.fullmatch(r"\[(.+)\]:(\d+)|([^:]+):(\d+)|\[(.+)\]|(.+)", rest)
    if match is None or (at and not user):
        raise ConfigError(f"{destination!r} is no board", hint="USER@HOST, or USER@HOST:PORT")
    host = next(part for part in (match[1], match[3], match[5], match[6]) if part)
    port = match[2] or match[4]
    if port is not None and not 1 <= int(port) <= 65535:
        raise ConfigError(f"{destination!r} has no port of 1 to 65535", hint="USER@HOST:PORT")
    _check(host, destination)
    return re.sub(r"[^A-Za-z0-9._-]", "-", rest.strip("[]")), Place(
        host, user or None, None if port is None else int(port), root=root
    )


def limited(inventory: Inventory, limits: Sequence[str]) -> Inventory:
    """The inventory with these limits (``NAME=VALUE``) in the place of each board's own of that name.

    Raises:
        ConfigError: one is none.
    """
    given: dict[str, Any] = {}
    for limit in limits:
        name, _, value = limit.partition("=")
        try:
            given[name] = float(value)
        except ValueError as error:
            raise ConfigError(
                f"{limit!r} is no limit", hint="--limit step_ms=120, image_s=5 or memory_mb=900"
            ) from error
    try:
        boards = {
            name: replace(place, limits=conform(Limits, {**asdict(place.limits), **given}))
            for name, place in inventory.boards.items()
        }
    except Mismatch as mismatch:
        raise mismatch.at("--limit", error=ConfigError, hint=_HINT) from mismatch
    return replace(inventory, boards=boards)


def select(inventory: Inventory, *, only: Sequence[str] = (), labels: Mapping[str, str] | None = None) -> Inventory:
    """The boards of these names and labels, all of them if none is said.

    Raises:
        ConfigError: a name is not in the inventory, or no board is left.
    """
    for name in only:
        if name not in inventory.boards:
            known = ", ".join(inventory.boards)
            raise ConfigError(f"the inventory has no board {name!r}", hint=f"it has {known}")
    wanted = labels or {}
    boards = {
        name: place
        for name, place in inventory.boards.items()
        if (not only or name in only) and all(place.labels.get(key) == value for key, value in wanted.items())
    }
    if not boards:
        asked = ", ".join(f"{key}={value}" for key, value in wanted.items())
        raise ConfigError(
            f"no board of the inventory has the labels {asked}", hint="mtu-compile boards status lists them"
        )
    return Inventory(boards, inventory.canary if inventory.canary in boards else None, inventory.parallel)
