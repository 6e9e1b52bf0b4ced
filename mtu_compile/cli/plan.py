"""``mtu-compile plan``: whether a model will fit a device, without building it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mtu_compile.cli.console import ConsoleProgress, table
from mtu_compile.cli.options import (
    cache_folder,
    cache_options,
    json_option,
    model_folder,
    quiet_option,
    target_option,
    what_to_build,
)
from mtu_compile.core.amounts import readable
from mtu_compile.core.routing import RoutingChoice


@click.command("plan")
@what_to_build
@target_option
@cache_options
@json_option
@quiet_option
def command(
    model: Path | None,
    target: str,
    precision: str,
    routing: RoutingChoice,
    tasks: tuple[str, ...],
    as_task: str | None,
    size: tuple[int, int] | None,
    memory: int | None,
    build_memory: int | None,
    cache: Path | None,
    no_cache: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Estimate the memory MODEL needs on a device, before anything is built.

    Both forms of routing are estimated: an engine for each task, and one for all; and one is recommended. The model is
    exported as `build` does it, into a temporary folder. Ends with exit code 1 where it does not fit, and says what
    would.
    """
    from mtu_compile.compile import PlanOptions, plan
    from mtu_compile.planner import COLUMNS, METHOD

    folder = model_folder(model)
    options = PlanOptions(
        model=folder,
        target=target,
        precision=precision,  # type: ignore[arg-type]
        routing=routing,
        tasks=tasks or None,
        as_task=as_task,
        size=size,
        memory=memory,
        build_memory=build_memory,
        cache=cache_folder(cache, no_cache),
    )
    planned = plan(options, ConsoleProgress(quiet))
    if as_json:
        click.echo(json.dumps(planned.to_json(), indent=2))
    else:
        known = ["memory not known: say --memory"]
        if planned.device_bytes is not None:
            known = [readable(planned.device_bytes)]
        elif planned.least_bytes is not None:
            known = [f"at least {readable(planned.least_bytes)}; more if you say --memory"]
        if planned.device_bytes is not None and planned.reserved_bytes:
            known.append(f"{readable(planned.reserved_bytes)} reserved")
        if planned.workspace_bytes:
            known.append(f"workspace {readable(planned.workspace_bytes)}")
        table(f"{folder} on {target} ({', '.join(known)})", COLUMNS, planned.rows(), quiet=quiet)
        click.echo(planned.routing_in_words())
        if disk := planned.disk_in_words():
            click.echo(disk)
        if not quiet:
            click.echo(METHOD, err=True)
            if planned.host is not None:
                click.echo(str(planned.host), err=True)
    planned.require()
