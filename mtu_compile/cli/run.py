"""``mtu-compile run``: make one picture with a bundle, or several together, without torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.options import (
    Offset,
    Size,
    json_option,
    quiet_option,
    scheduler_option,
    seed_option,
    trust_option,
    trusted_keys,
)
from mtu_compile.core.errors import ConfigError
from mtu_compile.core.fit import FITS, Fit

if TYPE_CHECKING:
    from mtu_compile.core.notices import Notice
    from mtu_compile.runtime import Result
    from mtu_compile.runtime.masks import MaskMode

#: What goes with ``--batch``; all else is in its file.
_OF_A_BATCH = frozenset({"bundle", "batch", "most_samples", "output", "trust", "as_json", "quiet"})


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--task", help="One of the bundle's tasks.")
@click.option("--prompt", default="", help="What to paint, or what to do to the picture.")
@click.option("--negative-prompt", default="", help="What to keep away from.")
@click.option("--image", type=click.Path(path_type=Path), help="The picture to start from.")
@click.option(
    "--fit",
    type=click.Choice(FITS),
    help="A picture of other proportions: take its middle, repeat the outermost pixels around it, or distort it; the "
    "bundle's own way by default.",
)
@click.option("--mask", type=click.Path(path_type=Path), help="Where the picture is to be repainted.")
@click.option(
    "--mask-mode",
    type=click.Choice(["auto", "white", "alpha"]),
    default="auto",
    show_default=True,
    help="What of the mask is repainted: what is white, what is transparent, or the second if anything is transparent.",
)
@seed_option("Of all noise.")
@click.option("--steps", type=click.IntRange(1, 1000), help="Denoising steps; the bundle's default otherwise.")
@click.option(
    "--guidance", "guidance_scale", type=float, help="Scale of the prompt's direction; 1 or less is no guidance."
)
@click.option("--image-guidance", "image_guidance_scale", type=float, help="Scale of the picture's direction.")
@scheduler_option
@click.option(
    "--original-size", type=Size(), help="SDXL: size a training picture like it had before it was scaled; small blurs."
)
@click.option(
    "--crops-coords-top-left", type=Offset(), help="SDXL: where such a picture was cut; 0,0 keeps things whole."
)
@click.option("--target-size", type=Size(), help="SDXL: size such a picture was scaled to.")
@click.option(
    "--step-cache/--no-step-cache",
    default=True,
    help="As the bundle does, with fewer whole UNet steps where it was built for that; or with all of them whole.",
)
@click.option(
    "--batch",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Make all pictures this JSON file asks for instead, those that can together (docs/guide.md).",
)
@click.option(
    "--most-samples",
    type=click.IntRange(min=1),
    help="With --batch: UNet samples of one call at most, as memory grows with them; 12 by default.",
)
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    help="Picture to write (.png, .jpg); with --batch, folder for them.",
)
@trust_option
@json_option
@quiet_option
@click.pass_context
def command(
    context: click.Context,
    bundle: Path,
    task: str | None,
    prompt: str,
    negative_prompt: str,
    image: Path | None,
    fit: Fit | None,
    mask: Path | None,
    mask_mode: MaskMode,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    image_guidance_scale: float | None,
    sampler: str | None,
    original_size: tuple[int, int] | None,
    crops_coords_top_left: tuple[int, int] | None,
    target_size: tuple[int, int] | None,
    step_cache: bool,
    batch: Path | None,
    most_samples: int | None,
    output: Path,
    trust: tuple[Path, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Make one picture with BUNDLE, or all that a file asks for."""
    if batch is not None:
        _only_of_a_batch(context)
        _run_batch(bundle, batch, most_samples, output, trust=trust, as_json=as_json, quiet=quiet)
        return
    if most_samples is not None:
        raise ConfigError("--most-samples is for --batch", hint="a single picture has a UNet call for all its samples")
    if task is None:
        raise click.MissingParameter(ctx=context, param_hint="'--task'", param_type="option")
    from mtu_compile import runtime
    from mtu_compile.runtime import images

    images.check_writable(output)
    trusted = trusted_keys(trust)
    progress = ConsoleProgress(quiet or as_json)
    with progress.stage("load and verify"):
        loaded = runtime.load(bundle, trusted=trusted)
    source = None if image is None else images.open_image(image)
    painted = None if mask is None else images.open_mask(mask)
    began = time.monotonic()
    with progress.stage(task, loaded.calls(task, steps, sampler)) as advance:
        result = loaded.run(
            task,
            prompt,
            negative_prompt=negative_prompt,
            image=source,
            fit=fit,
            mask=painted,
            mask_mode=mask_mode,
            seed=seed,
            steps=steps,
            guidance_scale=guidance_scale,
            image_guidance_scale=image_guidance_scale,
            scheduler=sampler,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            step_cache=step_cache,
            progress=lambda done, total: advance(1),
            notify=lambda notice: progress.note(_in_words(notice)),
        )
    seconds = time.monotonic() - began
    images.save(result.image, output)
    if as_json:
        click.echo(json.dumps({**_summary(output, task, seed, result), "seconds": round(seconds, 3)}))
    elif not quiet:
        click.echo(str(output))


def _run_batch(
    bundle: Path,
    file: Path,
    most_samples: int | None,
    output: Path,
    *,
    trust: tuple[Path, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Make the pictures that ``file`` asks for, in the folder ``output``."""
    from mtu_compile import runtime
    from mtu_compile.runtime import images
    from mtu_compile.runtime.grouping import MOST_SAMPLES
    from mtu_compile.runtime.request_file import read_requests

    named = read_requests(file)
    requests, paths = [request for request, _ in named], [output / name for _, name in named]
    if not output.is_dir() and (output.exists() or not output.parent.is_dir()):
        problem = "is not a folder" if output.exists() else "is in a folder that does not exist"
        raise ConfigError(f"{str(output)!r} {problem}", hint="with --batch, -o is the folder of the pictures")
    for path in paths if output.is_dir() else ():
        images.check_writable(path)
    progress = ConsoleProgress(quiet or as_json)
    with progress.stage("load and verify"):
        loaded = runtime.load(bundle, trusted=trusted_keys(trust))
    began, done_before, said = time.monotonic(), 0, set[str]()
    with progress.stage(f"{len(requests)} pictures", loaded.batch_calls(requests)) as advance:

        def told(done: int, total: int) -> None:
            nonlocal done_before
            advance(done - done_before)
            done_before = done

        def note(index: int, notice: Notice) -> None:
            if notice.kind != "batch-alone":
                progress.note(f"request {index + 1}: {_in_words(notice)}")
            elif notice.message not in said:  # the same of many pictures
                progress.note(_in_words(notice))
            said.add(notice.message)

        results = loaded.run_batch(
            requests,
            most_samples=MOST_SAMPLES if most_samples is None else most_samples,
            progress=told,
            notify=note,
        )
    seconds = time.monotonic() - began
    output.mkdir(exist_ok=True)
    for path, result in zip(paths, results, strict=True):
        images.save(result.image, path)
    if as_json:
        made = [
            _summary(path, request.task, request.seed, result)
            for path, request, result in zip(paths, requests, results, strict=True)
        ]
        click.echo(json.dumps({"pictures": made, "seconds": round(seconds, 3)}))
    elif not quiet:
        for path in paths:
            click.echo(str(path))


def _only_of_a_batch(context: click.Context) -> None:
    """``ConfigError`` for an option that says of one picture what the file says of each."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in _OF_A_BATCH:
            raise ConfigError(
                f"{parameter.opts[0]} says nothing of the pictures of a --batch", hint="say it in the file, of each"
            )


def _in_words(notice: Notice) -> str:
    return f"{notice.message}\nhint: {notice.hint}"


def _summary(output: Path, task: str, seed: int, result: Result) -> dict[str, Any]:
    frame = None if result.frame is None else {"used": result.frame.box, "place": result.frame.place}
    notices = [one.to_json() for one in result.notices]
    return {"output": str(output), "task": task, "seed": seed, "frame": frame, "notices": notices}
