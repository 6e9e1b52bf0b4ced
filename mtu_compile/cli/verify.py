"""``mtu-compile verify``: is a bundle, or a packed one, what somebody trusted has signed?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.options import json_option, quiet_option, trust_option, trusted_keys


@click.command("verify")
@click.argument("bundle", metavar="BUNDLE_OR_ARCHIVE", type=click.Path(path_type=Path))
@trust_option
@json_option
@quiet_option
def command(bundle: Path, trust: tuple[Path, ...], as_json: bool, quiet: bool) -> None:
    """Check every byte of a bundle, or of a packed one, and with --trust who signed it; exit 5 if anything is wrong."""
    from mtu_compile import bundle as bundles
    from mtu_compile.bundle import archive, signature

    trusted = trusted_keys(trust)
    signed: signature.Signed | None = None
    with ConsoleProgress(quiet or as_json).stage("verify"):
        if archive.is_archive(bundle):
            listed = archive.check(bundle, trusted=trusted)
            manifest, signed = listed.manifest, listed.signed
        else:
            manifest = bundles.read(bundle, trusted=trusted)
            if trusted is not None:
                signed = signature.verify(bundle, trusted)
    if as_json:
        by = None if signed is None else {"release": signed.release, "key_id": signed.key_id}
        body = {"bundle": str(bundle), "target": manifest.target, "tasks": list(manifest.tasks), "signed": by}
        click.echo(json.dumps({**body, "files": len(manifest.files)}, indent=2))
    elif not quiet:
        who = "nobody was asked for (--trust KEY.pub)"
        if signed is not None:
            who = f"release {signed.release}, by {signed.key_id}"
        click.echo(f"{bundle}: {len(manifest.files)} files, every hash holds; signature: {who}")
