"""``mtu-compile board``: what a board does with a bundle, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtu_compile.cli.check import conclude
from mtu_compile.cli.console import ConsoleProgress, table
from mtu_compile.cli.options import json_option, quiet_option, thresholds_option, trust_option, trusted_keys
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import TargetError

if TYPE_CHECKING:
    from mtu_compile.board.build import PlannedEngine


@click.group("board")
def command() -> None:
    """On a board: see what it is, build a bundle's engines, check them."""


@command.command("info")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@json_option
def info(bundle: Path | None, as_json: bool) -> None:
    """Show the device, TensorRT, CUDA and memory; with BUNDLE, which of its engines are built."""
    from mtu_compile import board as boards
    from mtu_compile import bundle as bundles
    from mtu_compile.board import build

    board = boards.probe()
    planned: tuple[PlannedEngine, ...] | None = None
    problem: TargetError | None = None
    notes: tuple[str, ...] = ()
    if bundle is not None:
        root = bundle.resolve()
        manifest = bundles.read(root)
        try:
            notes = build.check_board(manifest, board)
            planned = build.plan(root, manifest, board)
            build.check_space(root, [one for one in planned if one.state == "to be built"], board)
        except TargetError as error:
            problem = error
    if as_json:
        body: dict[str, Any] = {"board": board.to_json()}
        if bundle is not None:
            refused = None if problem is None else {"reason": problem.message, "hint": problem.hint}
            engines = None if planned is None else [one.to_json() for one in planned]
            body["bundle"] = {"path": str(bundle), "engines": engines, "notes": list(notes), "refused": refused}
        click.echo(json.dumps(body, indent=2))
        return
    for name, found in board.rows():
        click.echo(f"{name + ':':14}{found}")
    if planned is not None:
        rows = [
            (
                one.ref.path,
                readable(one.graph_bytes),
                one.why or one.state,
                readable(one.built.bytes) if one.built else "",
            )
            for one in planned
        ]
        table(f"engines of {bundle}", ("graph", "size", "state", "engine"), rows)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    if problem is not None:
        click.echo(f"cannot be built here: {problem.message}", err=True)
        if problem.hint:
            click.echo(f"hint: {problem.hint}", err=True)


@command.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Build again what is built.")
@click.option("--ignore-memory", is_flag=True, help="Try although the estimate says that memory or disk are too small.")
@trust_option
@json_option
@quiet_option
def build(bundle: Path, force: bool, ignore_memory: bool, trust: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Build the engines of BUNDLE that only this device can build; an interrupted build goes on where it stopped."""
    from mtu_compile.board import build_bundle

    progress = ConsoleProgress(quiet or as_json)
    trusted = trusted_keys(trust)
    result = build_bundle(bundle, force=force, ignore_memory=ignore_memory, trusted=trusted, progress=progress)
    for note in () if quiet else result.notes:
        click.echo(f"note: {note}", err=True)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
        return
    rows = [
        (
            one.graph,
            "was there" if one.graph in result.reused else f"{one.seconds:.1f} s",
            readable(one.bytes),
            one.engine,
        )
        for one in result.engines
    ]
    table(f"engines built in {bundle}", ("graph", "build", "size", "engine"), rows, quiet=quiet)


@command.command("local", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def local(arguments: tuple[str, ...]) -> None:
    """Install a packed bundle on this board without a host, go back, see what is there; `board local --help`."""
    import sys

    from mtu_compile.board.local import main

    sys.exit(main(arguments))


@command.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@thresholds_option
@trust_option
@json_option
@quiet_option
def check(bundle: Path, thresholds: Path | None, trust: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Run BUNDLE's engines on this device and compare them with the recorded float original; below, exit 3."""
    from mtu_compile.board import check_bundle

    progress, trusted = ConsoleProgress(quiet or as_json), trusted_keys(trust)
    result = check_bundle(bundle, thresholds=thresholds, trusted=trusted, progress=progress)
    conclude(result, "board check", bundle, as_json=as_json, quiet=quiet)
