"""``mtu-compile report``: everything known of a bundle, on one page."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.options import clip_option, json_option, quiet_option
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import ConfigError


@click.command("report")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    help="The page to write; BUNDLE-report.html beside the bundle if not given.",
)
@click.option("--force", is_flag=True, help="Replace an existing page.")
@clip_option
@json_option
@quiet_option
def command(bundle: Path, output: Path | None, force: bool, clip: Path | None, as_json: bool, quiet: bool) -> None:
    """Verify BUNDLE, make its pictures again, and write one HTML page of what is and is not known of it.

    The page needs no network and no other file. It is written, and the exit code is 0, also where a task is below its
    thresholds: the page says so. With --json the same goes to stdout, without pictures, and a page is written only if
    -o says where.
    """
    page = None if as_json and output is None else _page(bundle, output, force)
    from mtu_compile.core.atomic import atomic_file
    from mtu_compile.report.gather import gather
    from mtu_compile.report.render import render, require_libraries

    progress = ConsoleProgress(quiet or as_json)
    if page is not None:
        require_libraries()
    report = gather(bundle, clip=clip, progress=progress)
    if page is not None:
        with progress.stage("page"), atomic_file(page) as partial:
            partial.write_text(render(report), encoding="utf-8", newline="\n")
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    elif page is not None and not quiet:
        click.echo(f"{page}  ({readable(page.stat().st_size)})")
        for task in report.tasks:
            for failure in task.failures:
                click.echo(f"FAIL  {task.name}: {failure}", err=True)


def _page(bundle: Path, output: Path | None, force: bool) -> Path:
    """Where the page goes; ``ConfigError`` before anything is measured if it cannot go there."""
    # absolute() keeps links: a page about a link to a bundle lies beside the link. Of "." only resolve() has a name.
    folder = bundle.absolute() if bundle.name not in ("", "..") else bundle.resolve()
    page = folder.with_name(f"{folder.name}-report.html") if output is None else output
    if page.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"{str(page)!r} is inside the bundle, whose manifest vouches for every file in it",
            hint="write the page beside it with -o",
        )
    if page.is_dir():
        raise ConfigError(f"{str(page)!r} is a folder", hint="name a file with -o")
    if page.exists() and not force:
        raise ConfigError(f"{str(page)!r} already exists", hint="choose another place with -o, or pass --force")
    if not page.parent.is_dir():
        raise ConfigError(
            f"{str(page.parent)!r} is not a folder", hint="make it first, or choose another place with -o"
        )
    return page
