"""``mtu-compile inspect``: what is in a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtu_compile.cli.console import table
from mtu_compile.cli.options import json_option
from mtu_compile.cli.step_cache import print_schedules
from mtu_compile.core.amounts import readable

if TYPE_CHECKING:
    from mtu_compile.bundle import Manifest


@click.command("inspect")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--quant-config", "as_config", is_flag=True, help="Print how its tasks are quantised, for `build --quant-config`."
)
@json_option
def command(bundle: Path, as_config: bool, as_json: bool) -> None:
    """Verify BUNDLE and say what is in it."""
    from mtu_compile import bundle as bundles

    manifest = bundles.read(bundle, verify=True)
    if as_config:
        from calibration.quant_config import of_bundle

        click.echo(json.dumps(of_bundle(manifest), indent=2))
        return
    if as_json:
        click.echo(json.dumps(manifest.to_json(), indent=2))
        return
    size = sum((bundle / name).stat().st_size for name in manifest.files)
    height, width = manifest.image_size
    facts = [
        ("target", manifest.target),
        ("precision", manifest.precision),
        ("routing", manifest.routing),
        ("pictures", f"{width}x{height}"),
        ("source", f"{manifest.source.name} (sha256 {manifest.source.sha256[:16]}…)"),
        ("made by", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
        ("files", f"{len(manifest.files)}, {readable(size)}, every hash verified"),
    ]
    if proven := [one.level for one in manifest.instruction_sets if not one.failures]:
        facts.append(("proven at", f"instruction sets {', '.join(proven)}"))
    if (saved := manifest.provenance.shared_weights_saved_bytes) is not None:
        facts.append(("weights", f"of all tasks in one file, which saves {readable(saved)}"))
    if (decoder := manifest.provenance.decoder) is not None:
        away = f"worst PSNR to the float one's pictures {decoder.worst_psnr_db:.1f} dB, of {decoder.pictures}"
        facts.append(("VAE decoder", f"in INT8, {away}"))
    table(str(bundle), ("", ""), facts)
    rows = []
    for name, entry in manifest.tasks.items():
        accuracy = entry.accuracy
        measured = entry.accuracy_reason or "not measured"
        if accuracy is not None:
            similar = "" if accuracy["ssim"] is None else f"SSIM {accuracy['ssim']:.4f}, "
            measured = f"{similar}SQNR ≥ {accuracy['worst_sqnr_db']:.1f} dB ({accuracy['measured_with']})"
        condition = "+".join(entry.task.condition) or "-"
        rows.append((name, condition, str(entry.task.guidance), str(entry.default_steps), measured))
    table("tasks", ("task", "condition", "guidance", "steps", "accuracy"), rows)
    print_edits(manifest)
    print_schedules(manifest)
    print_parity(manifest)
    print_engines(bundle, manifest)


def print_edits(manifest: Manifest) -> None:
    """Graph passes of the user's own, and what they changed."""
    rows = [
        (name, edit.id, edit.sha256[:16], str(edit.rewrites), f"{edit.error:.2g} of {edit.tolerance:.2g}")
        for name, entry in manifest.tasks.items()
        for edit in entry.user_passes
    ]
    if rows:
        table("passes of the user's own", ("task", "pass", "sha256 of its file", "nodes", "error of what it may"), rows)


def print_engines(folder: Path, manifest: Manifest) -> None:
    """Every network: what the bundle carries of it, and what was and was not done with it where it was built.

    The size is what it reads: of weights that it shares with others, its part.
    """
    from mtu_compile.bundle import contents

    rows = []
    for where, engine in manifest.engines():
        carried = [name for name in (engine.prebuilt, engine.path, engine.weights) if name is not None]
        size = contents.bytes_of(folder, contents.graph_files(manifest, engine)) + (engine.weights_bytes or 0)
        estimate = "-"
        if engine.estimate is not None and engine.estimate.latency_ms is not None:
            estimate = f"{engine.estimate.latency_ms:.2f} ms ({engine.estimate.source})"
        name = where.removeprefix("tasks.").removesuffix(".engine")
        rows.append((name, " + ".join(carried), readable(size), estimate, engine.state_in_words))
    title = f"{folder}  ({manifest.target}, {manifest.precision})"
    table(title, ("network", "files", "size", "estimate, not measured", "state"), rows)


def print_parity(manifest: Manifest) -> None:
    """The same graph on every backend of the build machine, against the float original."""
    rows = []
    for name, entry in manifest.tasks.items():
        for row in entry.provenance.parity.rows if entry.provenance.parity is not None else ():
            ratio, against = row.worst_guidance_ratio, row.agreement_db
            rows.append(
                (
                    name,
                    row.backend,
                    f"{row.worst_sqnr_db:.1f} / {row.mean_sqnr_db:.1f}",
                    f"{row.worst_cosine:.5f}",
                    "-" if ratio is None else f"{ratio:.3f}",
                    "-" if against is None else f"{against:.1f}",
                )
            )
    columns = ("task", "backend", "SQNR dB worst/mean", "cosine worst", "guidance ratio worst", "dB against the first")
    if rows:
        table("the same graph on every backend here, against the float original", columns, rows)
