"""Options several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import click

from mtu_compile.core.errors import ConfigError
from mtu_compile.core.fit import FITS
from mtu_compile.core.routing import RoutingChoice
from mtu_compile.core.seeds import MAX_SEED

if TYPE_CHECKING:
    from mtu_compile.bundle.keys import PublicKey

_Command = TypeVar("_Command", bound=Callable[..., Any])

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "model"

quiet_option = click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")

clip_option = click.option(
    "--clip",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Ask the CLIP model of this folder (transformers' layout, safetensors) about the pictures, too.",
)
thresholds_option = click.option(
    "--thresholds",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge by the thresholds of this file, not the model's own (docs/accuracy.md).",
)
trust_option = click.option(
    "--trust",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Demand a signature by one of the public keys in FILE, before anything else is done; may be repeated.",
)


def trusted_keys(files: tuple[Path, ...]) -> tuple[PublicKey, ...] | None:
    """The keys that ``--trust`` names; ``None`` without it, which asks for no signature."""
    if not files:
        return None
    from mtu_compile.bundle.keys import read_trusted

    return read_trusted(files)


model_argument = click.argument("model", required=False, type=click.Path(path_type=Path))
task_option = click.option("--task", "tasks", multiple=True, help="Only this task; may be repeated.")
as_task_option = click.option(
    "--as-task",
    metavar="NAME",
    help="MODEL is a plain diffusers pipeline: take it as it is, as a network of one task (t2i, edit or inpaint).",
)
steps_option = click.option(
    "--steps", default=20, show_default=True, type=click.IntRange(1, 1000), help="Denoising steps."
)


class SchedulerName(click.ParamType[str]):
    """One of ``runtime.schedulers.NAMES``, which are looked up when one is given: commands start without numpy."""

    name = "NAME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from mtu_compile.runtime.schedulers import NAMES

        if value not in NAMES:
            self.fail(f"{value!r} is not one of {', '.join(NAMES)}", param, ctx)
        return str(value)


scheduler_option = click.option(
    "--scheduler",
    "--sampler",
    "sampler",
    type=SchedulerName(),
    help="Such as ddim, euler, dpm++ (docs/guide.md has all); the model's own by default.",
)


def seed_option(what: str) -> Callable[[_Command], _Command]:
    """``--seed``, and in its help ``what`` it is of."""
    return click.option("--seed", default=0, show_default="0", type=click.IntRange(0, MAX_SEED), help=what)


fit_option = click.option(
    "--fit",
    type=click.Choice(FITS),
    default="crop",
    show_default=True,
    help="Pictures of other proportions: take the middle, repeat the outermost pixels around them, or distort.",
)


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


class Offset(click.ParamType[tuple[int, int]]):
    """``16,0`` → ``(top, left)``."""

    name = "TOP,LEFT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,5}),(\d{1,5})", str(value))
        if not match:
            self.fail(f"{value!r} is not a distance from top and left such as 0,64", param, ctx)
        return int(match[1]), int(match[2])


class StepCache(click.ParamType[int | Literal["auto"]]):
    """``4`` → 4, the largest interval between whole steps; or ``auto``."""

    name = "K|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["auto"]:
        if value == "auto":
            return "auto"
        if not re.fullmatch(r"[1-9]\d{0,3}", str(value)) or not 2 <= int(value) <= 1000:
            self.fail(f"{value!r} is neither a number of steps from 2 to 1000 nor 'auto'", param, ctx)
        return int(value)


class Memory(click.ParamType[int]):
    """``16GB`` → bytes; GB are 10⁹ and GiB 2³⁰, MB and MiB likewise."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s?([MGT])(i?)B?", str(value), re.IGNORECASE)
        if not match or float(match[1]) == 0:
            self.fail(f"{value!r} is not an amount of memory such as 16GB", param, ctx)
        power = "MGT".index(match[2].upper()) + 2
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def what_to_build(command: _Command) -> _Command:
    """Give a command ``model``, ``precision``, ``routing``, ``tasks``, ``as_task``, ``size`` and memories.

    They are called as ``BuildOptions`` names them.
    """
    for parameter in reversed(_WHAT_TO_BUILD):  # as decorators are applied, from the bottom up
        command = parameter(command)
    return command


_CACHE_OPTIONS = (
    click.option(
        "--cache",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="DIR",
        help="Keep the results of steps here; the user's cache folder by default (`mtu-compile cache`).",
    ),
    click.option("--no-cache", is_flag=True, help="Make everything anew, and keep nothing of it."),
)


def cache_options(command: _Command) -> _Command:
    """Give a command ``cache`` and ``no_cache``, of which ``cache_folder`` makes a folder."""
    for parameter in reversed(_CACHE_OPTIONS):
        command = parameter(command)
    return command


def cache_folder(cache: Path | None, no_cache: bool = False) -> Path | None:
    """The cache that is meant: none, the given one, or the user's."""
    if no_cache:
        return None
    if cache is not None:
        return cache
    from platformdirs import user_cache_path

    return user_cache_path("mtu-compile", appauthor=False) / "steps"


_TARGET = "Device to build for; see `mtu-compile targets`."
target_option = click.option("--target", "-t", default="cpu", show_default=True, help=_TARGET)
targets_option = click.option(
    "--target", "-t", "targets", default=("cpu",), show_default="cpu", multiple=True, help=f"{_TARGET} May be repeated."
)
size_option = click.option("--size", type=Size(), help="Size of the pictures; the model's own by default.")

_WHAT_TO_BUILD = (
    model_argument,
    click.option("--int8", "precision", flag_value="int8", default=True, help="Quantise to INT8 (the default)."),
    click.option("--fp8", "precision", flag_value="fp8", help="Quantise to FP8 (E4M3), where the device has it."),
    click.option(
        "--int8-weights",
        "precision",
        flag_value="int8-weights",
        help="Weights in INT8, all else float; not calibrated.",
    ),
    click.option(
        "--int4-weights", "precision", flag_value="int4-weights", help="Linear layers' weights in INT4, others in INT8."
    ),
    click.option("--fp16", "precision", flag_value="fp16", help="Weights and activations in float16."),
    click.option("--bf16", "precision", flag_value="bf16", help="Weights and activations in bfloat16."),
    click.option("--fp32", "precision", flag_value="fp32", help="Keep everything in float32."),
    click.option(
        "--routing",
        type=click.Choice(get_args(RoutingChoice)),
        default="auto",
        show_default=True,
        help="An engine for each task (static), one for all tasks (shared), or what suits the device's memory.",
    ),
    task_option,
    as_task_option,
    size_option,
    click.option(
        "--memory",
        type=Memory(),
        help="Memory of the device, or of the machine whose memory it shares, where it is not this one (16GB).",
    ),
    click.option(
        "--build-memory", type=Memory(), help="Memory of this machine that the build may use; all of it by default."
    ),
)


def model_folder(model: Path | None) -> Path:
    """The model that is meant: the given folder, else the current one if it is a pipeline, else the example."""
    if model is not None:
        return model
    if Path("model_index.json").is_file():
        return Path.cwd()
    if (EXAMPLE / "model_index.json").is_file():
        return EXAMPLE
    raise ConfigError("no model given, and the current folder is none", hint="mtu-compile build MODEL --target cpu")
