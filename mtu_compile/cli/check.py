"""``mtu-compile check``: is a bundle as good as the float original?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtu_compile.cli.console import ConsoleProgress, table
from mtu_compile.cli.options import clip_option, json_option, quiet_option, thresholds_option
from mtu_compile.cli.step_cache import print_cached
from mtu_compile.core.errors import AccuracyError, ConfigError

if TYPE_CHECKING:
    from mtu_compile.accuracy.metric import Figure
    from mtu_compile.accuracy.verdict import CheckResult


@click.command("check")
@click.argument("bundle", type=click.Path(path_type=Path))
@clip_option
@thresholds_option
@click.option(
    "--suggest-thresholds",
    "suggesting",
    is_flag=True,
    help="Print a thresholds.json for the model, by what is measured here, instead of the table.",
)
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), help="With --suggest-thresholds: write it here instead."
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@json_option
@quiet_option
def command(
    bundle: Path,
    clip: Path | None,
    thresholds: Path | None,
    suggesting: bool,
    output: Path | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare every task's engine in BUNDLE with the recorded float original; below a threshold, exit 3."""
    if output is not None and not suggesting:
        raise ConfigError("--output is for --suggest-thresholds", hint="`mtu-compile report` writes what a check finds")
    if suggesting and as_json and output is None:
        raise ConfigError("both would go to stdout", hint="add -o FILE for the thresholds, or leave --json away")
    if output is not None and output.exists() and not force:
        raise ConfigError(f"{str(output)!r} already exists", hint="choose another place with -o, or pass --force")
    from mtu_compile.accuracy.host.check import check_bundle

    progress = ConsoleProgress(quiet or as_json)
    result = check_bundle(bundle, clip=clip, thresholds=thresholds, progress=progress)
    if suggesting:
        _suggest(result, output)
    conclude(result, "check", bundle, as_json=as_json, quiet=quiet, table=not suggesting or output is not None)


def _suggest(result: CheckResult, output: Path | None) -> None:
    """Thresholds by what was measured, to stdout or into a file."""
    from mtu_compile.accuracy.threshold_file import laxer_than_defaults, suggest
    from mtu_compile.core.atomic import atomic_file

    suggested = suggest(result.tasks, result.precision)
    for laxer in laxer_than_defaults(suggested):
        click.echo(f"note: {laxer}", err=True)
    text = json.dumps(suggested, indent=2)
    if output is None:
        click.echo(text)
        return
    with atomic_file(output) as partial:
        partial.write_text(text + "\n", encoding="utf-8", newline="\n")


def conclude(result: CheckResult, name: str, bundle: Path, *, as_json: bool, quiet: bool, table: bool = True) -> None:
    """Keep the proof of instruction sets beside ``bundle``, and print what the command ``name`` measured.

    Raises:
        AccuracyError: something is below its threshold.
    """
    from mtu_compile.runtime import proven

    if result.instruction_sets:
        proven.record(bundle.resolve(), result.instruction_sets)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    elif table:
        print_accuracy(result, quiet=quiet)
    if result.failures:
        hint = f"see `mtu-compile {name} BUNDLE --json` for every timestep"
        raise AccuracyError("; ".join(result.failures), hint=hint)


def print_accuracy(result: CheckResult, *, quiet: bool) -> None:
    """A table with one row per task; ``-`` is what does not apply or was not measured. The JSON has everything."""
    from mtu_compile.accuracy.summary import columns

    summaries = {name: task.summary() for name, task in result.tasks.items()}
    shown = columns()
    heads = ["task", *shown, "verdict"]
    rows = []
    for name, summary in summaries.items():
        verdict = "FAIL" if result.tasks[name].failures else "pass"
        rows.append([name, *(_cell(summary, figures) for figures in shown.values()), verdict])
    if any(summary["clip"] for summary in summaries.values()):
        heads.insert(-1, "CLIP\nimage / text")
        for row, summary in zip(rows, summaries.values(), strict=True):
            row.insert(-1, _clip(summary["clip"] or {}))
    table(f"accuracy against the float original ({result.measured_with})", heads, rows, quiet=quiet)
    print_cached(result.tasks, quiet=quiet)
    if result.instruction_sets:
        print_instruction_sets(result, quiet=quiet)


def print_instruction_sets(result: CheckResult, *, quiet: bool) -> None:
    """A table with one row for each instruction set the bundle was run at."""
    rows = [
        (
            proof.level + (" (imitated)" if proof.imitated else ""),
            *(_number(proof.worst_sqnr_db.get(name), ".1f") for name in result.tasks),
            "FAIL" if proof.failures else "pass",
        )
        for proof in result.instruction_sets
    ]
    title = f"UNet SQNR dB at its worst call, by instruction set ({result.instruction_sets[0].cpu})"
    table(title, ("instruction set", *result.tasks, "verdict"), rows, quiet=quiet)


def _cell(summary: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    """The figures of one column, side by side; one dash where there is none of them."""
    places = [(figure, place) for figure in figures for place in figure.places()]
    values = [(figure.form, _at(summary, place)) for figure, place in places]
    if all(value is None for _, value in values):
        return "-"
    return " / ".join("-" if value is None else form(value) for form, value in values)


def _at(summary: Mapping[str, Any], place: str) -> Any:
    value: Any = summary
    for name in place.split("."):
        value = (value or {}).get(name)
    return value


def _clip(clip: Mapping[str, float | None]) -> str:
    """Likeness of the two pictures, and what the candidate's gained or lost in likeness to the prompt."""
    text, before = clip.get("text"), clip.get("reference_text")
    gained = None if text is None or before is None else text - before
    return f"{_number(clip.get('image'), '.3f')} / {_number(gained, '+.3f')}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
