"""``mtu-compile build``: a model folder becomes a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mtu_compile.cli.console import ConsoleProgress, table
from mtu_compile.cli.options import (
    StepCache,
    cache_folder,
    cache_options,
    fit_option,
    json_option,
    model_folder,
    quiet_option,
    scheduler_option,
    seed_option,
    steps_option,
    targets_option,
    thresholds_option,
    what_to_build,
)
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import EXIT_ACCURACY, EXIT_INPUT, EXIT_OTHER, EXIT_TOOLCHAIN, EXIT_USAGE, MtuError
from mtu_compile.core.fit import Fit
from mtu_compile.core.routing import RoutingChoice

if TYPE_CHECKING:
    from mtu_compile.compile import BuildResult

#: Exit codes of targets that failed, the worst first.
WORST = (EXIT_OTHER, EXIT_INPUT, EXIT_TOOLCHAIN, EXIT_USAGE, EXIT_ACCURACY)


@click.command("build")
@what_to_build
@targets_option
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
@click.option(
    "--int8-decoder",
    is_flag=True,
    help="INT8: quantise the VAE decoder, too. Pictures are made sooner, and differ a little more from the original's.",
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
@click.option(
    "--step-cache",
    type=StepCache(),
    metavar="K|auto",
    help="Fewer whole UNet steps, at least every K-th, as long as pictures reach their thresholds (docs/guide.md).",
)
@cache_options
@click.option(
    "--executor",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="Where steps are run: here in this process, local in processes of their own, auto as suits the model's size; "
    "or by a cluster whose workers see the cache and the model, dask://HOST:PORT or ray://HOST:PORT.",
)
@seed_option("Of everything random.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="Bundle folder, MODEL-TARGET-PRECISION by default; for several targets a folder with a bundle for each, by "
    "its name, MODEL-PRECISION by default.",
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
@quiet_option
def command(
    model: Path | None,
    targets: tuple[str, ...],
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
    int8_decoder: bool,
    sampler: str | None,
    steps: int,
    fit: Fit,
    calibration_pictures: int,
    check_pictures: int,
    gate: str,
    thresholds: Path | None,
    fetch_wheels: bool,
    step_cache: int | Literal["auto"] | None,
    cache: Path | None,
    no_cache: bool,
    executor: str,
    seed: int,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compile MODEL, a multi-task pipeline folder, into a bundle for one device.

    With --as-task, MODEL is a plain diffusers pipeline, compiled as it is.

    MODEL is the current folder if that is a pipeline, else the example that comes with the source.

    With several targets, what is the same for them is made once. One that fails does not keep the others from being
    built; the exit code is then the worst: 1, else 5, 4, 2, or 3.
    """
    from mtu_compile.compile import BuildOptions, build_all

    folder, names = model_folder(model), tuple(dict.fromkeys(targets))
    several = len(names) > 1
    ending = precision if several else f"{names[0]}-{precision}"
    place = output or Path(f"{folder.resolve().name}-{ending}")
    options = BuildOptions(
        model=folder,
        output=place,
        target=names[0],
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
        cache=cache_folder(cache, no_cache),
        executor=executor,
        step_cache=step_cache,
        int8_decoder=int8_decoder,
    )
    each = [replace(options, target=name, output=place / name if several else place) for name in names]
    outcomes = dict(zip(names, build_all(each, ConsoleProgress(quiet)), strict=True))
    if several:
        conclude_all(outcomes, as_json=as_json, quiet=quiet)
        return
    (outcome,) = outcomes.values()
    if isinstance(outcome, MtuError):
        raise outcome
    if as_json:
        click.echo(json.dumps(summary(outcome), indent=2))
    else:
        _print(outcome, quiet)


def conclude_all(outcomes: Mapping[str, BuildResult | MtuError], *, as_json: bool, quiet: bool) -> None:
    """Print what became of each target; where one failed, end with the worst exit code."""
    failed = {name: one for name, one in outcomes.items() if isinstance(one, MtuError)}
    built = {name: one for name, one in outcomes.items() if not isinstance(one, MtuError)}
    if as_json:
        told = {
            "bundles": {name: summary(one) for name, one in built.items()},
            "failed": {
                name: {"message": one.message, "hint": one.hint, "exit_code": one.exit_code}
                for name, one in failed.items()
            },
        }
        click.echo(json.dumps(told, indent=2))
    else:
        print_outcomes(outcomes, quiet=quiet)
    for name, error in failed.items():
        click.echo(f"error: {name}: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
    if failed:
        raise click.exceptions.Exit(min((one.exit_code for one in failed.values()), key=WORST.index))


def print_outcomes(outcomes: Mapping[str, BuildResult | MtuError], *, quiet: bool) -> None:
    """A table with a row for each target."""
    rows = []
    for name, one in outcomes.items():
        if isinstance(one, MtuError):
            rows.append((name, "-", "-", "-", "-", f"FAILED (exit code {one.exit_code})"))
            continue
        entries = one.manifest.tasks.values()
        worst = [entry.accuracy["worst_sqnr_db"] for entry in entries if entry.accuracy is not None]
        states = dict.fromkeys(entry.engine.state.value for entry in entries)
        made = sum(not step.cached for step in one.steps)
        rows.append(
            (
                name,
                str(one.path),
                readable(_bytes(one.path)),
                f"{min(worst):.1f} dB" if worst else "not checked",
                f"{made} of {len(one.steps)}",
                ", ".join(states),
            )
        )
    heads = ("target", "bundle", "size", "worst UNet SQNR", "steps run", "engines")
    table("bundles", heads, rows, quiet=quiet)


def summary(result: BuildResult) -> dict[str, object]:
    from mtu_compile.bundle import encode

    manifest = result.manifest
    return {
        "bundle": str(result.path),
        "target": manifest.target,
        "precision": manifest.precision,
        "bytes": _bytes(result.path),
        "tasks": {name: entry.accuracy for name, entry in manifest.tasks.items()},
        "engines": {
            where: {"state": ref.state.value, "reason": ref.reason, "estimate": encode(ref.estimate)}
            for where, ref in manifest.engines()
        },
        "plan": encode(manifest.provenance.plan),
        "steps": encode(result.steps),
        "notices": {name: encode(entry.provenance.notices) for name, entry in manifest.tasks.items()},
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _print(result: BuildResult, quiet: bool) -> None:
    from mtu_compile.cli.check import print_accuracy
    from mtu_compile.cli.inspect import print_edits, print_engines, print_parity
    from mtu_compile.cli.step_cache import print_schedules

    if result.check is not None:
        print_accuracy(result.check, quiet=quiet)
    if not quiet:
        print_edits(result.manifest)
        print_schedules(result.manifest)
        print_parity(result.manifest)
        print_engines(result.path, result.manifest)
