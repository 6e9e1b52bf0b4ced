"""Options several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from mtu_compile.core.errors import ConfigError

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "model"

quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")


class Size(click.ParamType[tuple[int, int]]):
    """``64x48`` (width × height, as pictures are named) → ``(height, width)``."""

    name = "WIDTHxHEIGHT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", str(value))
        if not match:
            self.fail(f"{value!r} is not a size such as 512x512", param, ctx)
        return int(match[2]), int(match[1])


def model_folder(model: Path | None) -> Path:
    """The model that is meant: the given folder, else the current one if it is a pipeline, else the example."""
    if model is not None:
        return model
    if Path("model_index.json").is_file():
        return Path.cwd()
    if (EXAMPLE / "model_index.json").is_file():
        return EXAMPLE
    raise ConfigError("no model given, and the current folder is none", hint="mtu-compile build MODEL --target cpu")
