"""``mtu-compile check``: is a bundle as good as the float original?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtu_compile.cli.console import ConsoleProgress, table
from mtu_compile.cli.options import clip_option, json_option, quiet_option
from mtu_compile.core.errors import AccuracyError

if TYPE_CHECKING:
    from mtu_compile.accuracy.verdict import CheckResult, TaskCheck


@click.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@clip_option
@json_option
@quiet_option
def command(bundle: Path, clip: Path | None, as_json: bool, quiet: bool) -> None:
    """Compare every task's engine in BUNDLE with the recorded float original; below a threshold, exit 3."""
    from mtu_compile.accuracy.host.check import check_bundle
    from mtu_compile.runtime import proven

    result = check_bundle(bundle, clip=clip, progress=ConsoleProgress(quiet or as_json))
    if result.instruction_sets:
        proven.record(bundle.resolve(), result.instruction_sets)
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


#: What the table shows of a task: 103 characters wide for the example.
COLUMNS = (
    *("task", "UNet SQNR dB\nworst / mean", "deltas left\ntext / image", "latent\ndB", "image\ndB", "SSIM", "VIF"),
    *("inside / out\ndB", "truth\ndB", "verdict"),
)


def print_accuracy(result: CheckResult, *, quiet: bool) -> None:
    """A table with one row per task; ``-`` is what does not apply or was not measured. The JSON has everything."""
    columns: tuple[str, ...] = COLUMNS
    rows = [_row(name, task) for name, task in result.tasks.items()]
    if any(task.metrics.clip is not None for task in result.tasks.values()):
        columns = (*COLUMNS[:-1], "CLIP\nimage / text", COLUMNS[-1])
        clips = [_clip(task) for task in result.tasks.values()]
        rows = [(*row[:-1], clip, row[-1]) for row, clip in zip(rows, clips, strict=True)]
    table(f"accuracy against the float original ({result.measured_with})", columns, rows, quiet=quiet)
    if result.instruction_sets:
        print_instruction_sets(result, quiet=quiet)


def print_instruction_sets(result: CheckResult, *, quiet: bool) -> None:
    """A table with one row for each instruction set the bundle was run at."""
    rows = [
        (
            one.level + (" (imitated)" if one.imitated else ""),
            *(_number(one.worst_sqnr_db.get(name), ".1f") for name in result.tasks),
            "FAIL" if one.failures else "pass",
        )
        for one in result.instruction_sets
    ]
    title = f"UNet SQNR dB at its worst call, by instruction set ({result.instruction_sets[0].cpu})"
    table(title, ("instruction set", *result.tasks, "verdict"), rows, quiet=quiet)


def _row(name: str, task: TaskCheck) -> tuple[str, ...]:
    measured, left = task.metrics, {direction: one.ratio for direction, one in task.metrics.guidance.items()}
    return (
        name,
        f"{task.worst_sqnr:.1f} / {task.mean_sqnr:.1f}",
        _pair(left.get("text"), left.get("image"), ".2f"),
        _number(measured.latent_psnr_db, ".1f"),
        _number(measured.image_psnr_db, ".1f"),
        _number(measured.ssim, ".3f"),
        _number(measured.vif, ".3f"),
        _pair(measured.inside_psnr_db, measured.outside_psnr_db, ".1f"),
        _number(None if measured.truth_drop_db is None else -measured.truth_drop_db, "+.2f"),
        "FAIL" if task.failures else "pass",
    )


def _clip(task: TaskCheck) -> str:
    """Likeness of the two pictures, and what the candidate's gained or lost in likeness to the prompt."""
    clip = task.metrics.clip or {}
    text, before = clip.get("text"), clip.get("reference_text")
    gained = None if text is None or before is None else text - before
    return f"{_number(clip.get('image'), '.3f')} / {_number(gained, '+.3f')}"


def _pair(first: float | None, second: float | None, form: str) -> str:
    return "-" if first is None and second is None else f"{_number(first, form)} / {_number(second, form)}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
