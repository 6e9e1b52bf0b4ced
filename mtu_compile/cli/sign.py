"""``mtu-compile sign``: vouch for a bundle, as a release."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.key import read_passphrase
from mtu_compile.cli.options import json_option, quiet_option

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


@click.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", "key_file", required=True, type=click.Path(path_type=Path), help="A private key (key new).")
@click.option(
    "--release",
    required=True,
    type=click.IntRange(1, 2**53 - 1),
    help="Its number: larger than that of every bundle before; boards never go back by themselves.",
)
@click.option("--passphrase-file", type=click.Path(path_type=Path), help="Take the key's passphrase from this file.")
@json_option
@quiet_option
def command(
    bundle: Path, key_file: Path, release: int, passphrase_file: Path | None, as_json: bool, quiet: bool
) -> None:
    """Verify BUNDLE and write its signature.json; a signature that is there is replaced."""
    from mtu_compile.bundle import SIGNATURE, files, keys, signature

    key = _read_key(key_file, passphrase_file)
    with ConsoleProgress(quiet or as_json).stage("verify"):
        files.read_to_sign(bundle)
    signature.sign(bundle, key, release=release)
    found = signature.verify(bundle, (keys.PublicKey.of(key),))
    if as_json:
        body = {"bundle": str(bundle), "release": found.release, "key_id": found.key_id}
        click.echo(json.dumps({**body, "manifest_sha256": found.manifest_sha256}, indent=2))
    elif not quiet:
        click.echo(f"{bundle / SIGNATURE}: release {found.release}, by {found.key_id}")


def _read_key(file: Path, passphrase_file: Path | None) -> Ed25519PrivateKey:
    """The key; whoever sits at a terminal is asked for its passphrase."""
    from mtu_compile.bundle import keys

    if passphrase_file is not None:
        return keys.read_private(file, read_passphrase(passphrase_file))
    try:
        return keys.read_private(file)
    except keys.NeedsPassphrase:
        if not sys.stdin.isatty():
            raise
    return keys.read_private(file, click.prompt("passphrase", hide_input=True, err=True))
