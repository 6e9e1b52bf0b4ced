"""``mtu-compile key``: keys to sign bundles with, and to trust."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mtu_compile.cli.options import json_option, quiet_option


@click.group("key")
def command() -> None:
    """Keys to sign bundles with (Ed25519, in files that ssh-keygen and openssl read, too)."""


@command.command("new")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--comment", default="", help="Whose key it is; goes into PATH.pub.")
@click.option("--passphrase", "ask", is_flag=True, help="Ask for a passphrase, and keep the private key behind it.")
@click.option("--passphrase-file", type=click.Path(path_type=Path), help="Take the passphrase from this file's line.")
@json_option
@quiet_option
def new(path: Path, comment: str, ask: bool, passphrase_file: Path | None, as_json: bool, quiet: bool) -> None:
    """Write a new private key to PATH, which stays where bundles are signed, and PATH.pub, which boards are given."""
    from mtu_compile.bundle import keys

    keys.check_free(path)
    passphrase = None
    if passphrase_file is not None:
        passphrase = read_passphrase(passphrase_file)
    elif ask:
        passphrase = click.prompt("passphrase", hide_input=True, confirmation_prompt=True, err=True)
    public = keys.write_pair(path, keys.new_private(), comment=comment, passphrase=passphrase)
    if as_json:
        files = {"private": str(path), "public": str(keys.public_of(path))}
        click.echo(json.dumps({**files, "key_id": public.key_id, "comment": public.comment}, indent=2))
    elif not quiet:
        click.echo(public.key_id)


@command.command("show")
@click.argument("paths", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def show(paths: tuple[Path, ...], as_json: bool) -> None:
    """Show the public keys in files, called as `ssh-keygen -l` calls them."""
    from mtu_compile.bundle import keys

    found = keys.read_trusted(paths)
    if as_json:
        body = [{"key_id": one.key_id, "comment": one.comment, "line": one.line} for one in found]
        click.echo(json.dumps(body, indent=2))
        return
    for one in found:
        click.echo(f"{one.key_id} {one.comment}".rstrip())


def read_passphrase(file: Path) -> str:
    """The first line of a file; ``ConfigError`` if there is none."""
    from mtu_compile.core.errors import ConfigError

    try:
        with file.open(encoding="utf-8") as lines:
            line = lines.readline(4096).rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}", hint="a file with the passphrase") from error
    if not line:
        raise ConfigError(f"{str(file)!r} has no passphrase", hint="write it into the first line")
    return line
