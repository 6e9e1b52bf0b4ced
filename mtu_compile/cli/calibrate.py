"""``mtu-compile calibrate``: calibration sets from the user's own prompts and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtu_compile.cli.console import ConsoleProgress, table
from mtu_compile.cli.options import (
    as_task_option,
    cache_folder,
    cache_options,
    fit_option,
    json_option,
    model_argument,
    model_folder,
    quiet_option,
    scheduler_option,
    seed_option,
    size_option,
    steps_option,
    task_option,
)
from mtu_compile.core.fit import Fit

if TYPE_CHECKING:
    from calibration.shared_scales import SharedScale
    from mtu_compile.calibrate import CalibrateResult

#: Layers of the table of ranges.
_SHOWN = 10


@click.command("calibrate")
@model_argument
@click.option(
    "--data", type=click.Path(path_type=Path), help="Prompts and pictures (DIR/TASK/metadata.jsonl); MODEL/samples."
)
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@task_option
@as_task_option
@size_option
@click.option("--pictures", default=12, show_default=True, type=click.IntRange(1), help="Per task.")
@scheduler_option
@steps_option
@click.option(
    "--calls", default=10, show_default=True, type=click.IntRange(1), help="UNet calls kept of each picture's steps."
)
@fit_option
@seed_option("Of the noise.")
@click.option(
    "--ranges/--no-ranges", default=True, show_default=True, help="Measure activations and compare them between tasks."
)
@cache_options
@click.option("--force", is_flag=True, help="Replace an existing calibration set.")
@json_option
@quiet_option
def command(
    model: Path | None,
    data: Path | None,
    output: Path,
    tasks: tuple[str, ...],
    as_task: str | None,
    size: tuple[int, int] | None,
    pictures: int,
    sampler: str | None,
    steps: int,
    calls: int,
    fit: Fit,
    seed: int,
    ranges: bool,
    cache: Path | None,
    no_cache: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run MODEL on prompts and pictures, and keep what its UNet sees as calibration sets for `build --calibration`.

    MODEL is the current folder if that is a pipeline, else the example that comes with the source. Rows marked "check",
    or else every fourth, are left out: builds check their accuracy with them.
    """
    from mtu_compile.calibrate import CalibrateOptions, calibrate

    options = CalibrateOptions(
        model=model_folder(model),
        output=output,
        data=data,
        tasks=tasks or None,
        as_task=as_task,
        size=size,
        pictures=pictures,
        sampler=sampler,
        steps=steps,
        calls=calls,
        fit=fit,
        seed=seed,
        ranges=ranges,
        force=force,
        cache=cache_folder(cache, no_cache),
    )
    result = calibrate(options, ConsoleProgress(quiet))
    if as_json:
        click.echo(json.dumps(_summary(result), indent=2))
    else:
        _print(result, quiet)


def _summary(result: CalibrateResult) -> dict[str, object]:
    from calibration.shared_scales import to_json

    compared = None if result.ranges is None else to_json(result.ranges)
    return {
        "calibration_set": str(result.path),
        "tasks": {task: made.describe() for task, made in result.sets.items()},
        "notices": {task: [one.to_json() for one in found] for task, found in result.notices.items()},
        "ranges": compared and {key: compared[key] for key in ("layers_compared", "limit_db", "conflicts")},
    }


def _print(result: CalibrateResult, quiet: bool) -> None:
    rows = []
    for task, made in result.sets.items():
        times = sorted(set(made.timesteps))
        met = f"{len(times)} ({times[0]:g} to {times[-1]:g})"
        rows.append((task, str(len(made.prompts)), str(len(made.inputs)), met, made.sha256[:12]))
    table(f"{result.path}", ("task", "pictures", "UNet calls", "timesteps", "sha256"), rows, quiet=quiet)
    if result.ranges is not None and len(result.ranges) > 1:
        _print_ranges(result, quiet)


def _print_ranges(result: CalibrateResult, quiet: bool) -> None:
    from calibration.shared_scales import LIMIT_DB, conflicts, largest, shared_scales

    assert result.ranges is not None
    ranges = largest(result.ranges)
    layers, costly = shared_scales(ranges), conflicts(ranges)
    rows = []
    for one in layers[:_SHOWN]:
        cells = [_cell(one, task) for task in ranges]
        rows.append((one.layer, *cells))
    title = "Largest activation (dB of quantisation SNR that one scale for all tasks would cost)"
    table(title, ("layer", *ranges), rows, quiet=quiet)
    if not quiet:
        verdict = f"one scale for all tasks costs some task more than {LIMIT_DB:g} dB"
        click.echo(f"{len(costly)} of {len(layers)} layers: {verdict}; each task has scales of its own", err=True)


def _cell(layer: SharedScale, task: str) -> str:
    """A task's own range, and what the shared one costs it."""
    if task not in layer.ranges:
        return ""
    loss = layer.loss_db[task]
    return f"{layer.ranges[task]:.3g}" + (f" (-{loss:.1f})" if loss >= 0.05 else "")
