"""``mtu-compile pack``: a bundle as a single file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.options import json_option, quiet_option
from mtu_compile.core.amounts import readable


@click.command("pack")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
@quiet_option
def command(bundle: Path, file: Path, force: bool, as_json: bool, quiet: bool) -> None:
    """Write BUNDLE, with its signature, to FILE: a tar whose bytes are the same wherever it is packed."""
    from mtu_compile.bundle import archive

    with ConsoleProgress(quiet or as_json).stage("pack"):
        archive.pack(bundle, file, replace=force)
    size = file.stat().st_size
    if as_json:
        click.echo(json.dumps({"file": str(file), "bytes": size}, indent=2))
    elif not quiet:
        click.echo(f"{file}: {readable(size)}")
