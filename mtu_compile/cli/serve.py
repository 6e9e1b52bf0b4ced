"""``mtu-compile serve``: a bundle behind OpenAI's Images API, with a page to try it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from mtu_compile.core.errors import ToolchainMissing
from mtu_compile.serve.settings import Option, Settings, options

_PACKAGES = ("fastapi", "uvicorn", "starlette", "pydantic", "python_multipart", "multipart", "prometheus_client")


def _option(one: Option) -> click.Option:
    kind: Any = one.kind
    if kind is bool:
        return click.Option([one.flag], is_flag=True, help=one.text)
    if one.low is not None and one.kind in (int, float):
        kind = (click.IntRange if one.kind is int else click.FloatRange)(one.low, one.high)  # type: ignore[arg-type]
    if one.kind is Path:
        kind = click.Path(path_type=Path)
    shown = one.default is not None and not one.many
    return click.Option(
        [one.flag], type=kind, multiple=one.many, default=one.default, show_default=shown, help=one.text
    )


def _run(bundle: Path, **given: Any) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        from mtu_compile.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _PACKAGES:
            raise
        raise ToolchainMissing(f"{error.name} is not installed", hint="pip install 'mtu-compile[serve]'") from error
    serve(Settings(bundle, **given), click.echo, lambda line: click.echo(f"note: {line}", err=True))


command = click.Command(
    "serve",
    params=[click.Argument(["bundle"], type=click.Path(path_type=Path)), *map(_option, options())],
    callback=_run,
    help="Serve BUNDLE by OpenAI's Images API, with a page to try it, until Ctrl-C or SIGTERM.\n\n"
    "Prints the page's address, with the token that clients need, when it listens.",
)
