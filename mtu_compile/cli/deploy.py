"""``mtu-compile deploy``: a bundle to boards over SSH."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtu_compile.cli.console import ConsoleProgress, table
from mtu_compile.cli.fleet_options import boards_of, boards_options
from mtu_compile.cli.options import json_option, quiet_option
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import MtuError

if TYPE_CHECKING:
    from mtu_compile.deploy.deployment import Options, Outcome, Package
    from mtu_compile.deploy.fleet import FleetResult
    from mtu_compile.deploy.inventory import Inventory, Place


@click.command("deploy")
@click.argument("bundle", type=click.Path(path_type=Path))
@boards_options
@click.option("--activate", is_flag=True, help="Switch each board to the version, once it is proven there.")
@click.option("--dry-run", is_flag=True, help="Say what would travel and be built, and change nothing.")
@click.option("--canary", metavar="NAME", help="Deploy to this board first, and to no other if it fails.")
@click.option(
    "--keep-going", is_flag=True, help="Go on with other boards after one has failed, but not after the canary."
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=MOST",
    help="Refuse a version that takes more there: step_ms, image_s, memory_mb; instead of the inventory's. Repeatable.",
)
@click.option("--unsigned", is_flag=True, help="The bundle is not signed; a board that was given keys refuses it.")
@click.option("--recheck", is_flag=True, help="Check what was checked there before with the same packages and drivers.")
@click.option(
    "--retries", default=1, show_default=True, type=click.IntRange(0, 100), help="Begin again after a link was cut."
)
@json_option
@quiet_option
def command(
    bundle: Path,
    destinations: tuple[str, ...],
    inventory: Path | None,
    only: tuple[str, ...],
    labels: tuple[str, ...],
    parallel: int | None,
    root: str | None,
    silence: float,
    activate: bool,
    dry_run: bool,
    canary: str | None,
    keep_going: bool,
    limits: tuple[str, ...],
    unsigned: bool,
    recheck: bool,
    retries: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Take BUNDLE to boards over SSH, prove it there, and with --activate switch to it.

    BUNDLE is a folder, or the single file that `mtu-compile pack` makes. Each board is left running the new bundle,
    proven on its own device, or the one it had. What was measured on a board is kept beside the bundle, and shown by
    `mtu-compile report`.

    The exit code is that of the board that failed first: 3 below a threshold or beyond a limit there, 4 a toolchain is
    missing there, 5 the bundle was refused, 1 not reached or anything else.
    """
    boards = boards_of(destinations, inventory, only, labels, parallel, root, canary)
    from mtu_compile.deploy import deployment
    from mtu_compile.deploy.inventory import limited

    boards = limited(boards, limits)
    from mtu_compile.deploy.connection import load

    load()
    progress = ConsoleProgress(quiet or as_json)
    options = deployment.Options(activate, dry_run, unsigned, recheck, silence, retries)
    kept = bundle.with_name(f"{bundle.name}.boards") if bundle.is_file() else None
    with contextlib.ExitStack() as stack:
        if kept is not None:
            bundle = _unpacked(bundle, stack, progress)
        with progress.stage("verify the bundle"):
            package = deployment.Package.read(bundle)
        result = _run(boards, package, options, kept, keep_going, progress)
    if as_json:
        click.echo(json.dumps({"boards": {name: _to_json(one) for name, one in result.outcomes.items()}}, indent=2))
    elif dry_run:
        _print_plans(result.outcomes, quiet=quiet)
    else:
        _print(result, activate, quiet=quiet)
    _print_errors(result)
    if result.exit_code:
        sys.exit(result.exit_code)


def _unpacked(archive: Path, stack: contextlib.ExitStack, progress: ConsoleProgress) -> Path:
    """The bundle in an archive, in a folder that is removed with ``stack``."""
    from mtu_compile.bundle.archive import unpack
    from mtu_compile.core.atomic import scratch

    folder = stack.enter_context(scratch("mtu-compile-deploy")) / "bundle"
    with progress.stage("unpack the bundle"):
        unpack(archive, folder)
    return folder


def _run(
    boards: Inventory,
    package: Package,
    options: Options,
    kept: Path | None,
    keep_going: bool,
    progress: ConsoleProgress,
) -> FleetResult:
    """Deploy to every board; what it measured is kept beside the bundle, or in the folder ``kept``."""
    from mtu_compile.deploy import deployment, figures, fleet

    watch = _Lines(progress)

    async def one(name: str, place: Place) -> Outcome:
        outcome = await deployment.deploy(name, place, package, options, watch)
        if outcome.figures is not None:
            figures.record(package.path, name, outcome.figures, folder=kept)
        return outcome

    return asyncio.run(fleet.run(boards, one, keep_going=keep_going))


class _Lines:
    """A line for each step that has ended."""

    def __init__(self, progress: ConsoleProgress) -> None:
        self._progress = progress

    def begins(self, board: str, step: str, what: str = "") -> None:
        """Nothing: boards go on side by side."""

    def ends(self, board: str, step: str, seconds: float) -> None:
        self._progress.tell(f"{board}: {step}: {seconds:.1f} s")

    def tells(self, board: str, message: str) -> None:
        self._progress.tell(f"{board}: {message}")


def _print(result: FleetResult, activate: bool, *, quiet: bool) -> None:
    rows = []
    for name, outcome in result.outcomes.items():
        if outcome is None:
            rows.append((name, "not tried", "", "", "", "", ""))
            continue
        said = "active" if activate else "proven, not active"
        if outcome.error is not None:
            said = f"failed after {outcome.reached}" if outcome.reached else "failed"
        tasks: Mapping[str, Any] = {} if outcome.figures is None else outcome.figures["measured"]["tasks"]
        peak = None if outcome.figures is None else outcome.figures["measured"]["peak_bytes"]
        steps = "\n".join(f"{task} {timing['step_ms']:.1f} ms" for task, timing in tasks.items())
        devices = "\n".join(dict.fromkeys(timing["device"] for timing in tasks.values()))
        rows.append(
            (
                name,
                said,
                _short(outcome.active),
                readable(outcome.sent_bytes),
                steps,
                "" if peak is None else readable(peak),
                devices,
            )
        )
    heads = ("board", "new version", "runs now", "sent", "a step, measured there", "memory", "ran on")
    table("boards", heads, rows, quiet=quiet)


def _print_plans(outcomes: Mapping[str, Outcome | None], *, quiet: bool) -> None:
    rows = []
    for name, outcome in outcomes.items():
        plan = None if outcome is None else outcome.plan
        if outcome is None or plan is None:
            rows.append((name, "not tried" if outcome is None else "failed", "", "", "", ""))
            continue
        rows.append(
            (
                name,
                plan["system"],
                _short(outcome.active),
                f"{plan['files']} of {plan['of_files']} files, {readable(plan['bytes'])}",
                plan["environment"],
                f"{len(plan['build'])} engines" if plan["build"] else "nothing",
            )
        )
    heads = ("board", "system", "runs now", "would travel", "packages", "built there")
    table("what would be done", heads, rows, quiet=quiet)


def _print_errors(result: FleetResult) -> None:
    for name, outcome in result.outcomes.items():
        if outcome is None or outcome.error is None:
            continue
        error = outcome.error
        message = error.message if isinstance(error, MtuError) else f"{type(error).__name__}: {error}"
        click.echo(f"error: {name}: {message}", err=True)
        if isinstance(error, MtuError) and error.hint:
            click.echo(f"hint: {error.hint}", err=True)


def _to_json(outcome: Outcome | None) -> dict[str, Any] | None:
    if outcome is None:
        return None
    error = outcome.error
    said = None
    if error is not None:
        message = error.message if isinstance(error, MtuError) else str(error)
        hint = error.hint if isinstance(error, MtuError) else None
        said = {"kind": type(error).__name__, "message": message, "hint": hint}
    return {
        "reached": outcome.reached,
        "version": outcome.version,
        "active": outcome.active,
        "plan": outcome.plan,
        "sent_bytes": outcome.sent_bytes,
        "seconds": outcome.seconds,
        "board": outcome.facts,
        "figures": outcome.figures,
        "error": said,
    }


def _short(version: str | None) -> str:
    return "nothing" if version is None else version[:12]
