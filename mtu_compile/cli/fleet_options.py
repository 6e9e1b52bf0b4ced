"""Options of commands that reach boards over SSH."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mtu_compile.core.errors import ConfigError

if TYPE_CHECKING:
    from mtu_compile.deploy.inventory import Inventory

_Command = TypeVar("_Command", bound=Callable[..., Any])


def boards_options(command: _Command) -> _Command:
    """Which boards, and how to reach them."""
    options = (
        click.argument("destinations", nargs=-1, metavar="[USER@HOST]..."),
        click.option("--inventory", type=click.Path(path_type=Path), metavar="FILE", help="Boards by name (TOML)."),
        click.option("--board", "only", multiple=True, metavar="NAME", help="Only this one; repeatable."),
        click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only boards with this label."),
        click.option("--parallel", type=click.IntRange(1, 256), help="Boards at a time; the inventory's, or 4."),
        click.option("--root", metavar="FOLDER", help="Where a board keeps its versions; not with --inventory."),
        click.option(
            "--timeout",
            "silence",
            default=60.0,
            show_default=True,
            type=click.FloatRange(1, 3600),
            metavar="SECONDS",
            help="A link on which nothing is heard for so long is cut, and its board unlocked.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def boards_of(
    destinations: Sequence[str],
    inventory: Path | None,
    only: Sequence[str],
    labels: Sequence[str],
    parallel: int | None,
    root: str | None,
    canary: str | None = None,
) -> Inventory:
    """The boards that are meant; ``ConfigError`` if these contradict each other, or are none."""
    from dataclasses import replace

    from mtu_compile.deploy import inventory as inventories

    if inventory is None:
        if only or labels or canary:
            raise ConfigError(
                "--board, --label and --canary pick from an inventory", hint="add --inventory boards.toml"
            )
        if not destinations:
            raise ConfigError("no board is named", hint="add USER@HOST, or --inventory boards.toml")
        places = dict(inventories.parse(one, root or inventories.ROOT) for one in destinations)
        if len(places) != len(destinations):
            raise ConfigError("a board is named twice", hint="name each once")
        return inventories.Inventory(places, None, parallel or 4)
    if destinations or root:
        raise ConfigError("boards are named on the command line and in an inventory", hint="pick from it with --board")
    wanted = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not equals or not key:
            raise ConfigError(f"{label!r} is no label", hint="--label KEY=VALUE")
        wanted[key] = value
    read = inventories.read(inventory)
    if canary is not None:
        if canary not in read.boards:
            raise ConfigError(f"the canary {canary!r} is none of the boards", hint=f"they are {', '.join(read.boards)}")
        read = replace(read, canary=canary)
    chosen = inventories.select(read, only=only, labels=wanted)
    return chosen if parallel is None else replace(chosen, parallel=parallel)
