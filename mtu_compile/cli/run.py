"""``mtu-compile run``: make one picture with a bundle, without torch."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.options import json_option, quiet_option, scheduler_option, seed_option
from mtu_compile.core.fit import FITS, Fit

if TYPE_CHECKING:
    from mtu_compile.runtime.masks import MaskMode


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--task", required=True, help="One of the bundle's tasks.")
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
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), help="Picture to write (.png, .jpg).")
@json_option
@quiet_option
def command(
    bundle: Path,
    task: str,
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
    output: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make one picture with BUNDLE."""
    from mtu_compile import runtime
    from mtu_compile.runtime import images

    images.check_writable(output)
    progress = ConsoleProgress(quiet or as_json)
    with progress.stage("load and verify"):
        loaded = runtime.load(bundle)
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
            progress=lambda done, total: advance(1),
            notify=lambda notice: progress.note(f"{notice.message}\nhint: {notice.hint}"),
        )
    seconds = time.monotonic() - began
    images.save(result.image, output)
    if as_json:
        said = {"output": str(output), "task": task, "seed": seed, "seconds": round(seconds, 3)}
        frame = None if result.frame is None else {"used": result.frame.box, "place": result.frame.place}
        click.echo(json.dumps({**said, "frame": frame, "notices": [one.to_json() for one in result.notices]}))
    elif not quiet:
        click.echo(str(output))
