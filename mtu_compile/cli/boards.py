"""``mtu-compile boards``: what boards have and run, and the way back."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtu_compile.cli.console import ConsoleProgress, table
from mtu_compile.cli.fleet_options import boards_of, boards_options
from mtu_compile.cli.options import json_option, quiet_option
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import MtuError

if TYPE_CHECKING:
    from mtu_compile.deploy.inventory import Inventory
    from mtu_compile.deploy.visit import Answer


@click.group("boards")
def command() -> None:
    """Boards that were deployed to: see their versions, go back, prune, hand over keys."""


@command.command("status")
@boards_options
@json_option
@quiet_option
def status(as_json: bool, quiet: bool, silence: float, **boards: Any) -> None:
    """Show what each board is, which version it runs, and which it could go back to."""

    def rows(name: str, said: Mapping[str, Any]) -> list[tuple[str, ...]]:
        board, found = said["board"], []
        what = board["model"] or board["cpu"] or board["machine"]
        for version, record in said["versions"].items():
            state = record["state"]
            if version == said["active"]:
                state = "active"
            elif version == said["previous"]:
                state = "before it"
            elif record["failures"]:
                state = "failed its check"
            release = "" if record["release"] is None else str(record["release"])
            found.append((name, what, version[:12], record["source"], release, state, ""))
        free = readable(board["disk_free_bytes"])
        return [(*row[:-1], free) for row in found] or [(name, what, "", "", "", "no version", free)]

    heads = ("board", "what it is", "version", "checkpoint", "release", "state", "disk free")
    _visit("status", boards_of(**boards), silence, heads, rows, as_json=as_json, quiet=quiet)


@command.command("rollback")
@boards_options
@json_option
@quiet_option
def rollback(as_json: bool, quiet: bool, silence: float, **boards: Any) -> None:
    """Go back to the version that was active before, on each board; it was proven there when it came."""

    def rows(name: str, said: Mapping[str, Any]) -> list[tuple[str, ...]]:
        return [(name, said["before"][:12], said["active"][:12])]

    _visit("rollback", boards_of(**boards), silence, ("board", "ran", "runs now"), rows, as_json=as_json, quiet=quiet)


@command.command("prune")
@boards_options
@click.option("--keep-unfinished", is_flag=True, help="Keep versions that never became active, and cut transfers.")
@json_option
@quiet_option
def prune(as_json: bool, quiet: bool, silence: float, keep_unfinished: bool, **boards: Any) -> None:
    """Remove versions from each board, never the active one nor the one before it."""

    def rows(name: str, said: Mapping[str, Any]) -> list[tuple[str, ...]]:
        return [(name, str(len(said["removed"])), readable(said["freed_bytes"]))]

    heads = ("board", "versions removed", "freed")
    chosen = boards_of(**boards)
    _visit("prune", chosen, silence, heads, rows, as_json=as_json, quiet=quiet, unfinished=not keep_unfinished)


@command.command("trust")
@boards_options
@click.option(
    "--key", "keys", multiple=True, required=True, type=click.Path(path_type=Path), help="A public key; repeatable."
)
@json_option
@quiet_option
def trust(as_json: bool, quiet: bool, silence: float, keys: tuple[Path, ...], **boards: Any) -> None:
    """Give each board the keys it trusts, in the place of those it has: from then on it takes only what they signed."""
    from mtu_compile.bundle.keys import read_trusted

    lines = "".join(f"{key.line}\n" for key in read_trusted(keys))

    def rows(name: str, said: Mapping[str, Any]) -> list[tuple[str, ...]]:
        return [(name, "\n".join(said["keys"]))]

    _visit(
        "trust_keys", boards_of(**boards), silence, ("board", "trusts"), rows, as_json=as_json, quiet=quiet, keys=lines
    )


@command.command("wheels")
@click.argument("bundle", type=click.Path(path_type=Path))
@boards_options
@click.option(
    "--for",
    "systems_said",
    multiple=True,
    metavar="PYTHON-MACHINE-GLIBC",
    help="A board that cannot be asked: 3.11-aarch64-2.36. Repeatable.",
)
@json_option
@quiet_option
def wheels(
    bundle: Path, as_json: bool, quiet: bool, silence: float, systems_said: tuple[str, ...], **boards: Any
) -> None:
    """Put into BUNDLE the packages that boards need, so that its signature is over them, too: sign it after this.

    Each board is asked which Python, machine and glibc it has, and nothing else of it.
    """
    from mtu_compile.deploy import carry, visit
    from mtu_compile.deploy.packages import System

    said = [System.parse(one) for one in systems_said]
    progress = ConsoleProgress(quiet or as_json)
    if boards["destinations"] or boards["inventory"] or not said:
        chosen = boards_of(**boards)
        with progress.stage("ask the boards"):
            found = asyncio.run(visit.systems(chosen, silence=silence))
        for one in found.values():
            if isinstance(one, BaseException):
                raise one
        said += [one for one in found.values() if not isinstance(one, BaseException)]
    systems = tuple(dict.fromkeys(said))
    added = carry.add_wheels(bundle, systems, progress=progress)
    if as_json:
        body = {"bundle": str(bundle), "systems": [str(one) for one in systems], "added": added}
        click.echo(json.dumps(body, indent=2))
        return
    rows = [(str(one), str(added[str(one)])) for one in systems]
    table(f"packages in {bundle}", ("for", "packages"), rows, quiet=quiet)


def _visit(
    step: str,
    boards: Inventory,
    silence: float,
    heads: tuple[str, ...],
    rows: Callable[[str, Mapping[str, Any]], list[tuple[str, ...]]],
    *,
    as_json: bool,
    quiet: bool,
    **arguments: Any,
) -> None:
    """Do one step on every board, and print a table of what they said."""
    from mtu_compile.deploy import visit
    from mtu_compile.deploy.connection import load

    load()
    answers = asyncio.run(visit.ask(boards, step, silence=silence, **arguments))
    if as_json:
        click.echo(json.dumps({"boards": {name: _to_json(answer) for name, answer in answers.items()}}, indent=2))
    else:
        found = [
            row for name, answer in answers.items() if answer.result is not None for row in rows(name, answer.result)
        ]
        if found:
            table("boards", heads, found, quiet=quiet)
    for name, answer in answers.items():
        error = answer.error
        if error is not None:
            click.echo(f"error: {name}: {error.message if isinstance(error, MtuError) else error}", err=True)
            if isinstance(error, MtuError) and error.hint:
                click.echo(f"hint: {error.hint}", err=True)
    if code := visit.exit_code(answers):
        sys.exit(code)


def _to_json(answer: Answer) -> dict[str, Any]:
    error = answer.error
    said = None if error is None else {"kind": type(error).__name__, "message": str(error)}
    return {"result": answer.result, "error": said}
