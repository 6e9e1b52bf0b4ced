"""``mtu-compile targets``: what can be built for, and what is missing here."""

from __future__ import annotations

import json

import click

from mtu_compile.cli.console import table
from mtu_compile.cli.options import json_option


@click.command("targets")
@json_option
def command(as_json: bool) -> None:
    """List the targets, whether their toolchain is here, and the command that installs it."""
    import targets

    rows = []
    for name in targets.names():
        target = targets.get(name)
        available = target.probe()
        rows.append(
            {
                "name": name,
                "vendor": target.spec.vendor,
                "device": target.spec.device,
                "precisions": list(target.spec.precisions),
                "available": available.ok,
                "toolchain": available.toolchain,
                "version": available.version,
                "install": None if available.ok else available.install_hint,
            }
        )
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    columns = ("target", "device", "precisions", "toolchain", "here")
    drawn = [
        (
            str(row["name"]),
            f"{row['vendor']} {row['device']}",
            " ".join(row["precisions"]),  # type: ignore[arg-type]
            f"{row['toolchain']} {row['version'] or ''}".strip(),
            "yes" if row["available"] else str(row["install"]),
        )
        for row in rows
    ]
    table("targets", columns, drawn)
