"""``mtu-compile check``: is a bundle as good as the float original?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtu_compile.cli.console import ConsoleProgress, table
from mtu_compile.cli.options import json_option, quiet_option
from mtu_compile.core.errors import AccuracyError

if TYPE_CHECKING:
    from mtu_compile.verdict import CheckResult


@click.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
@quiet_option
def command(bundle: Path, as_json: bool, quiet: bool) -> None:
    """Compare every task's engine in BUNDLE with the recorded float original; below a threshold, exit 3."""
    from mtu_compile.check import check_bundle

    result = check_bundle(bundle, progress=ConsoleProgress(quiet or as_json))
    report(result, "check", as_json=as_json, quiet=quiet)


def report(result: CheckResult, name: str, *, as_json: bool, quiet: bool) -> None:
    """Print what the command ``name`` measured; ``AccuracyError`` if anything is below its threshold."""
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        print_accuracy(result, quiet=quiet)
    if result.failures:
        hint = f"see `mtu-compile {name} BUNDLE --json` for every timestep"
        raise AccuracyError("; ".join(result.failures), hint=hint)


def print_accuracy(result: CheckResult, *, quiet: bool) -> None:
    """A table with one row per task: worst and mean of each metric, and the verdict."""
    rows = [
        (
            name,
            f"{task.worst_sqnr:.1f} / {task.mean_sqnr:.1f}",
            f"{task.worst_cosine:.5f}",
            f"{task.metrics.latent_psnr_db:.1f}",
            f"{task.metrics.image_psnr_db:.1f}",
            "not measured" if task.metrics.ssim is None else f"{task.metrics.ssim:.4f}",
            "FAIL" if task.failures else "pass",
        )
        for name, task in result.tasks.items()
    ]
    columns = ("task", "UNet SQNR dB worst/mean", "cosine worst", "latent PSNR dB", "image PSNR dB", "SSIM", "verdict")
    table(f"accuracy against the float original ({result.measured_with})", columns, rows, quiet=quiet)
