"""``mtu-compile cache``: what builds have kept, and making room."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtu_compile.cli.console import table
from mtu_compile.cli.options import Memory, cache_folder, json_option, quiet_option
from mtu_compile.core.amounts import readable

if TYPE_CHECKING:
    from mtu_compile.steps.store import Listed

_folder = click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="The cache; the user's by default.",
)


@click.group("cache")
def command() -> None:
    """Results of steps that builds have kept, so that others need not make them again."""


@command.command("ls")
@_folder
@json_option
@quiet_option
def ls(cache: Path | None, as_json: bool, quiet: bool) -> None:
    """List what is kept, the least recently used first."""
    from mtu_compile.steps.limit import limit_of
    from mtu_compile.steps.store import Store

    folder = cache_folder(cache)
    assert folder is not None
    if not folder.is_dir():
        listed: list[Listed] = []
    else:
        with Store(folder) as store:
            listed = store.ls()
    total, limit = sum(one.bytes for one in listed), limit_of(folder)
    if as_json:
        entries = [_entry(one) for one in listed]
        click.echo(json.dumps({"cache": str(folder), "bytes": total, "limit": limit, "entries": entries}, indent=2))
        return
    rows = [
        (one.name, one.title or "damaged", readable(one.bytes), _when(one), "yes" if one.in_use else "")
        for one in listed
    ]
    title = f"{folder}: {readable(total)} of at most {readable(limit)}"
    table(title, ("entry", "what", "size", "used", "in use"), rows, quiet=quiet)


@command.command("prune")
@_folder
@click.option("--limit", type=Memory(), help="Leave at most this much (20GB); what a build leaves, by default.")
@click.option("--all", "everything", is_flag=True, help="Leave nothing.")
@json_option
@quiet_option
def prune(cache: Path | None, limit: int | None, everything: bool, as_json: bool, quiet: bool) -> None:
    """Remove the least recently used, and what is damaged; what a running build needs stays."""
    from mtu_compile.steps.limit import limit_of
    from mtu_compile.steps.store import Store

    folder = cache_folder(cache)
    assert folder is not None
    removed, left = list["Listed"](), 0
    if folder.is_dir():
        with Store(folder) as store:
            removed = store.prune(0 if everything else limit_of(folder) if limit is None else limit)
            left = sum(one.bytes for one in store.ls())
    freed = sum(one.bytes for one in removed)
    if as_json:
        entries = [_entry(one) for one in removed]
        click.echo(json.dumps({"cache": str(folder), "bytes": left, "freed": freed, "removed": entries}, indent=2))
    elif not quiet:
        click.echo(f"{len(removed)} entries removed, {readable(freed)}; {readable(left)} left in {folder}")


def _entry(one: Listed) -> dict[str, object]:
    return {"name": one.name, "title": one.title, "bytes": one.bytes, "used": _when(one), "in_use": one.in_use}


def _when(one: Listed) -> str:
    return datetime.fromtimestamp(one.used).astimezone().isoformat(timespec="seconds")
