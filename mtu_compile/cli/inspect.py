"""``mtu-compile inspect``: what is in a bundle."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mtu_compile.cli.console import megabytes, table
from mtu_compile.cli.options import json_option


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@json_option
def command(bundle: Path, as_json: bool) -> None:
    """Verify BUNDLE and say what is in it."""
    from mtu_compile import bundle as bundles

    manifest = bundles.read(bundle, verify=True)
    if as_json:
        click.echo(json.dumps(manifest.to_json(), indent=2))
        return
    size = sum((bundle / name).stat().st_size for name in manifest.files)
    height, width = manifest.image_size
    facts = [
        ("target", manifest.target),
        ("precision", manifest.precision),
        ("pictures", f"{width}x{height}"),
        ("source", f"{manifest.source.name} (sha256 {manifest.source.sha256[:16]}…)"),
        ("made by", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
        ("files", f"{len(manifest.files)}, {megabytes(size)}, every hash verified"),
    ]
    table(str(bundle), ("", ""), facts)
    rows = []
    for name, entry in manifest.tasks.items():
        accuracy = entry.accuracy
        measured = entry.accuracy_reason or "not measured"
        if accuracy is not None:
            measured = f"SSIM {accuracy['ssim']:.4f}, SQNR ≥ {accuracy['worst_sqnr_db']:.1f} dB"
        guidance = str(entry.task.guidance)
        condition = "+".join(entry.task.condition) or "-"
        rows.append((name, condition, guidance, str(entry.default_steps), entry.engine.path, measured))
    table("tasks", ("task", "condition", "guidance", "steps", "engine", "accuracy"), rows)
