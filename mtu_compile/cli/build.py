"""``mtu-compile build``: a model folder becomes a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.options import (
    fit_option,
    json_option,
    model_folder,
    quiet_option,
    scheduler_option,
    seed_option,
    steps_option,
    thresholds_option,
    what_to_build,
)
from mtu_compile.core.fit import Fit
from mtu_compile.core.routing import RoutingChoice

if TYPE_CHECKING:
    from mtu_compile.compile import BuildResult


@click.command("build")
@what_to_build
@click.option("--data", type=click.Path(path_type=Path), help="Prompts and pictures to calibrate and check with.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Quantise with this folder of calibration sets (`mtu-compile calibrate`) instead of capturing inputs.",
)
@click.option(
    "--quant-config",
    type=click.Path(path_type=Path),
    help="Quantise as this bundle or JSON file says instead of searching for the layers that stay float.",
)
@click.option(
    "--pass",
    "passes",
    multiple=True,
    metavar="FILE.py:FUNCTION",
    help="Run this function over each task's onnx_graphsurgeon.Graph before it is quantised; may be repeated.",
)
@click.option(
    "--mixed-precision/--no-mixed-precision",
    "mixed",
    default=True,
    show_default=True,
    help="INT8: keep layers float where the device runs INT8 slower, or where accuracy needs it.",
)
@scheduler_option
@steps_option
@fit_option
@click.option("--calibration-pictures", default=12, show_default=True, type=click.IntRange(1), help="Per task.")
@click.option("--check-pictures", default=4, show_default=True, type=click.IntRange(1), help="Per task.")
@click.option(
    "--accuracy-gate",
    "gate",
    type=click.Choice(["off", "warn", "fail"]),
    default="fail",
    show_default=True,
    help="What a task below its accuracy threshold does to the build.",
)
@thresholds_option
@click.option(
    "--wheels/--no-wheels",
    "fetch_wheels",
    default=True,
    show_default=True,
    help="For boards: put the packages the runtime needs into the bundle, so that the board needs no internet.",
)
@seed_option("Of everything random.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="Bundle folder; MODEL-TARGET-PRECISION by default."
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
@quiet_option
def command(
    model: Path | None,
    target: str,
    precision: str,
    routing: RoutingChoice,
    tasks: tuple[str, ...],
    as_task: str | None,
    size: tuple[int, int] | None,
    memory: int | None,
    build_memory: int | None,
    data: Path | None,
    calibration: Path | None,
    quant_config: Path | None,
    passes: tuple[str, ...],
    mixed: bool,
    sampler: str | None,
    steps: int,
    fit: Fit,
    calibration_pictures: int,
    check_pictures: int,
    gate: str,
    thresholds: Path | None,
    fetch_wheels: bool,
    seed: int,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile MODEL, a multi-task pipeline folder, into a bundle for one device.

    With --as-task, MODEL is a plain diffusers pipeline, compiled as it is.

    MODEL is the current folder if that is a pipeline, else the example that comes with the source.
    """
    from mtu_compile.compile import BuildOptions, build

    folder = model_folder(model)
    options = BuildOptions(
        model=folder,
        output=output or Path(f"{folder.resolve().name}-{target}-{precision}"),
        target=target,
        precision=precision,  # type: ignore[arg-type]
        routing=routing,
        tasks=tasks or None,
        as_task=as_task,
        size=size,
        memory=memory,
        build_memory=build_memory,
        data=data,
        calibration=calibration,
        quant_config=quant_config,
        thresholds=thresholds,
        mixed=mixed,
        passes=passes,
        sampler=sampler,
        steps=steps,
        fit=fit,
        calibration_pictures=calibration_pictures,
        check_pictures=check_pictures,
        gate=gate,  # type: ignore[arg-type]
        seed=seed,
        fetch_wheels=fetch_wheels,
        force=force,
    )
    result = build(options, ConsoleProgress(quiet))
    if as_json:
        click.echo(json.dumps(_summary(result), indent=2))
    else:
        _print(result, quiet)


def _summary(result: BuildResult) -> dict[str, object]:
    from mtu_compile.bundle import encode

    manifest = result.manifest
    return {
        "bundle": str(result.path),
        "target": manifest.target,
        "precision": manifest.precision,
        "bytes": sum(p.stat().st_size for p in result.path.rglob("*") if p.is_file()),
        "tasks": {name: entry.accuracy for name, entry in manifest.tasks.items()},
        "engines": {
            where: {"state": ref.state.value, "reason": ref.reason, "estimate": encode(ref.estimate)}
            for where, ref in manifest.engines()
        },
        "plan": encode(manifest.provenance.plan),
        "notices": {name: encode(entry.provenance.notices) for name, entry in manifest.tasks.items()},
    }


def _print(result: BuildResult, quiet: bool) -> None:
    from mtu_compile.cli.check import print_accuracy
    from mtu_compile.cli.inspect import print_edits, print_engines, print_parity

    if result.check is not None:
        print_accuracy(result.check, quiet=quiet)
    if not quiet:
        print_edits(result.manifest)
        print_parity(result.manifest)
        print_engines(result.path, result.manifest)
