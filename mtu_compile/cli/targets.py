"""``mtu-compile targets``: what can be built for, and what is missing here."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mtu_compile.cli.console import table
from mtu_compile.cli.options import json_option

if TYPE_CHECKING:
    from targets.base import Availability, TargetSpec


@click.command("targets")
@json_option
def command(as_json: bool) -> None:
    """List the targets, whether their toolchain is here, and the command that installs it."""
    import targets
    from targets.base import GIB

    known = [(target.spec, target.probe(), target.device_here()) for target in map(targets.get, targets.names())]
    if as_json:
        click.echo(json.dumps([_described(*one) for one in known], indent=2, default=str))
        return
    rows = [
        (
            spec.name,
            f"{spec.vendor} {spec.device}",
            " ".join(spec.precisions),
            "the device's own" if spec.memory_bytes is None else f"{spec.memory_bytes / GIB:.0f} GiB",
            "on the board" if spec.board_requirements() else "here",
            f"{available.toolchain} {available.version or ''}".strip(),
            ("yes" if here else "yes; the device is not here") if available.ok else available.install_hint,
        )
        for spec, available, here in known
    ]
    table("targets", ("target", "device", "precisions", "memory", "engines built", "toolchain", "available"), rows)


def _described(spec: TargetSpec, available: Availability, here: bool) -> dict[str, Any]:
    """Everything that is known of a target, and where each number comes from."""
    return {
        **asdict(spec),
        "available": available.ok,
        "device_here": here,
        "toolchain": available.toolchain,
        "version": available.version,
        "detail": available.detail,
        "install": None if available.ok else available.install_hint,
        "board_requirements": spec.board_requirements(),
    }
