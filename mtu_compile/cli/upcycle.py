"""``mtu-compile upcycle``: a pretrained pipeline folder becomes a multi-task one."""

from __future__ import annotations

from pathlib import Path

import click

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.core.errors import ConfigError
from mtu_compile.core.schema import Mismatch, conform, read_json
from mtu_compile.core.tasks import PAPER_TASKS, Task, Tasks, find_task

TASKS_HINT = 'write a JSON list of tasks: [{"name": "depth", "condition": ["image"], "guidance": "text"}, …]'


@click.command("upcycle")
@click.argument("base", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The MTU pipeline folder to write."
)
@click.option("--experts", type=click.IntRange(1), help="Experts a block; by default the paper's: 4, and 1 for SDXL.")
@click.option("--task", "names", multiple=True, metavar="NAME", help="A task to include; all of them by default.")
@click.option(
    "--tasks", "tasks_file", type=click.Path(path_type=Path), help="JSON list of tasks instead of the paper's."
)
@click.option("--d-task", default=768, show_default=True, type=click.IntRange(1), help="Width of the task embedding.")
@click.option("--router-width", default=768, show_default=True, type=click.IntRange(1), help="Hidden width of routers.")
@click.option("--norm-per-expert", is_flag=True, help="One norm affine per task and expert, instead of per task.")
@click.option("--top-k", metavar="K[,K…]", help="Experts kept: one number for all tasks, or one for each.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True)
@click.option("--force", is_flag=True, help="Replace the model folder if it exists.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def command(
    base: Path,
    output: Path,
    experts: int | None,
    names: tuple[str, ...],
    tasks_file: Path | None,
    d_task: int,
    router_width: int,
    norm_per_expert: bool,
    top_k: str | None,
    dtype: str,
    force: bool,
    quiet: bool,
) -> None:
    """Turn the diffusers pipeline folder BASE into a multi-task one that starts as the same function.

    The paper's tasks are t2i, edit, sr and inpaint. A file given with --tasks lists others, each an object with name,
    condition (of image, masked_image, mask), guidance (none, text, text+image), guidance_scale, image_guidance_scale
    and downscale.
    """
    tasks = read_tasks(tasks_file) if tasks_file else PAPER_TASKS
    if names:
        tasks = tuple(find_task(tasks, name)[1] for name in names)
    kept = _top_k(top_k, len(tasks))

    import torch

    from mtu_compile.model.upcycle import upcycle_folder

    with ConsoleProgress(quiet).stage("upcycle"):
        unet = upcycle_folder(
            base,
            output,
            tasks,
            dtype=getattr(torch, dtype),
            force=force,
            d_task=d_task,
            router_width=router_width,
            norm_per_expert=norm_per_expert,
            top_k=kept,
            **({} if experts is None else {"num_experts": experts}),
        )
    if not quiet:
        millions = sum(p.numel() for p in unet.parameters()) / 1e6
        listed = ", ".join(task.name for task in tasks)
        count = unet.config.num_experts
        click.echo(f"{output}: {millions:.1f}M parameters in the UNet, experts a block: {count}, tasks {listed}")
        if any(task.guidance == "embedded" for task in unet.tasks):
            click.echo("the UNet takes the guidance scale as an input: one sample a step, and no negative prompt")


def read_tasks(path: Path) -> tuple[Task, ...]:
    """Task descriptions from a JSON list."""
    if not path.is_file():
        raise ConfigError(f"{path} cannot be read: there is no such file", hint=TASKS_HINT)
    try:
        tasks: tuple[Task, ...] = conform(Tasks, read_json(path, hint=TASKS_HINT))
    except Mismatch as mismatch:
        raise mismatch.at(path, hint=TASKS_HINT) from mismatch
    return tasks


def _top_k(text: str | None, tasks: int) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            f"--top-k {text!r} is not a list of numbers", hint="write --top-k 2 or --top-k 4,2,1,2"
        ) from error
    numbers = numbers * tasks if len(numbers) == 1 else numbers
    if len(numbers) != tasks:
        raise ConfigError(
            f"--top-k gives {len(numbers)} numbers for {tasks} tasks", hint="give one, or one for each task"
        )
    return numbers
