"""``mtu-compile unpack``: the bundle in a single file, as a folder."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.options import Memory, json_option, quiet_option, trust_option, trusted_keys
from mtu_compile.core.amounts import readable


@click.command("unpack")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@trust_option
@click.option("--most", type=Memory(), help="Refuse more than this (20GB).")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
@quiet_option
def command(
    file: Path, folder: Path, trust: tuple[Path, ...], most: int | None, force: bool, as_json: bool, quiet: bool
) -> None:
    """Unpack FILE to FOLDER, which appears whole or not at all; what is no bundle, bit by bit, is refused."""
    from dataclasses import replace

    from mtu_compile.bundle import archive

    limits = archive.DEFAULT_LIMITS
    if most is not None:
        limits = replace(limits, bytes=most)
    trusted = trusted_keys(trust)
    with ConsoleProgress(quiet or as_json).stage("unpack"):
        listed = archive.unpack(file, folder, limits=limits, trusted=trusted, replace=force)
    by = None if listed.signed is None else {"release": listed.signed.release, "key_id": listed.signed.key_id}
    if as_json:
        click.echo(json.dumps({"bundle": str(folder), "bytes": listed.bytes, "signed": by}, indent=2))
    elif not quiet:
        click.echo(f"{folder}: {len(listed.manifest.files)} files, {readable(listed.bytes)}")
