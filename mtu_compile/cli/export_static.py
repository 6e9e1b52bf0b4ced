"""``mtu-compile export-static``: one task of a bundle, for tools that know no input ``task`` and no shared weights."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.options import json_option, quiet_option


@click.command("export-static")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--task", required=True, help="One of the bundle's tasks.")
@json_option
@quiet_option
def command(bundle: Path, out: Path, task: str, as_json: bool, quiet: bool) -> None:
    """Write one task of BUNDLE, whose tasks share a network or weights, to the folder OUT.

    OUT has the layout of a Stable Diffusion pipeline exported by optimum-intel, which OpenVINO GenAI and optimum-intel
    open (docs/interop.md); it is no bundle, and mtu-compile does not run it.
    """
    from mtu_compile.export_static import export_static

    made = export_static(bundle, task, out, ConsoleProgress(quiet or as_json))
    if as_json:
        click.echo(json.dumps({"output": str(made.path), "unet": str(made.unet), "pipeline": made.pipeline}))
    elif not quiet:
        opened = f"opens as {made.pipeline}" if made.pipeline else "no pipeline of diffusers' kind has such a task"
        click.echo(f"{made.unet}  ({opened})")
