"""``mtu-compile train``: experts, routers, task norms and input convolutions on all tasks at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mtu_compile.cli.console import ConsoleProgress
from mtu_compile.cli.options import fit_option, seed_option

if TYPE_CHECKING:
    from mtu_compile.model.train_config import StepReport

_PATH = click.Path(path_type=Path)


@click.command("train")
@click.argument("model", type=_PATH)
@click.option("--data", type=_PATH, required=True, help="One image folder a task: DATA/<task>/metadata.jsonl.")
@click.option("-o", "--output", type=_PATH, required=True, help="The MTU pipeline folder to write (EMA weights).")
@click.option("--work", type=_PATH, help="Checkpoints, TensorBoard log and cache.  [default: OUTPUT.train]")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="A task to train; all of the model's by default.")
@click.option("--steps", default=10_000, show_default=True, type=click.IntRange(1))
@click.option("--batch-size", default=16, show_default=True, type=click.IntRange(1), help="For each task and process.")
@click.option("--accumulate", default=1, show_default=True, type=click.IntRange(1), help="Micro-batches a step.")
@click.option("--learning-rate", default=1e-4, show_default=True, help="Peak.")
@click.option("--schedule", type=click.Choice(["cosine", "constant"]), default="cosine", show_default=True)
@click.option("--warmup", default=0.05, show_default=True, help="Share of the steps the learning rate rises for.")
@click.option("--weight-decay", default=0.01, show_default=True)
@click.option("--clip", default=1.0, show_default=True, help="Largest gradient norm.")
@click.option("--ema", default=0.999, show_default=True, help="Decay of the moving average.")
@click.option("--min-snr", type=float, metavar="GAMMA", help="Min-SNR weighting of the timesteps (5 is usual).")
@click.option("--mixed-precision", type=click.Choice(["no", "bf16"]), default="no", show_default=True)
@seed_option("Of data order, noise, timesteps, masks and dropout.")
@click.option("--streaming", is_flag=True, help="Read the data line by line and keep nothing, for sets of any size.")
@click.option("--mask-variants", default=8, show_default=True, type=click.IntRange(1), help="Random masks a picture.")
@fit_option
@click.option("--cache-gb", default=8.0, show_default=True, help="Larger encoded sets are encoded again at every step.")
@click.option("--gradient-checkpointing", is_flag=True, help="Less memory, more time.")
@click.option("--save-every", default=500, show_default=True, type=click.IntRange(1), help="Steps between checkpoints.")
@click.option("--keep", default=2, show_default=True, type=click.IntRange(1), help="Checkpoints kept.")
@click.option("--log-every", default=50, show_default=True, type=click.IntRange(1), help="Steps between printed lines.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint, if there is one.")
@click.option("--force", is_flag=True, help="Replace OUTPUT; without --resume also start over.")
@click.option("--export", "export_only", is_flag=True, help="Only write OUTPUT from the last checkpoint.")
@click.option(
    "--save-dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32", show_default=True
)
@click.option("--max-hours", type=float, help="Stop in good order, with a checkpoint and OUTPUT, after so long.")
@click.option("--cpu", is_flag=True, help="Leave a GPU unused.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def command(quiet: bool, log_every: int, export_only: bool, **settings: Any) -> None:
    """Train the MTU pipeline folder MODEL on all of its tasks; the pretrained backbone stays as it is.

    Rows of metadata.jsonl: file_name (the wanted picture), prompt, image_file_name (source of an edit), mask_file_name
    (random masks without it); super-resolution pairs are made from the target. Rows with "split": "check" are left out.

    Many GPUs: accelerate launch "$(which mtu-compile)" train MODEL …
    """
    from accelerate import PartialState

    from mtu_compile.model.train import export, train
    from mtu_compile.model.train_config import TrainConfig

    config = TrainConfig(**{**settings, "tasks": tuple(settings["tasks"])})
    if export_only:
        result = export(config)
    else:
        with _watch(quiet, log_every, config.steps) as on_step:
            result = train(config, on_step=on_step, progress=ConsoleProgress(quiet))
    if not quiet and PartialState().is_main_process:
        losses = "".join(f", {task} {loss:.4f}" for task, loss in result.losses.items())
        click.echo(f"{result.output}: step {result.step} of {config.steps}, {result.hours:.2f} h{losses}")


@contextmanager
def _watch(quiet: bool, every: int, steps: int) -> Iterator[Callable[[StepReport], None]]:
    """A bar on a terminal, a line every ``every`` steps elsewhere."""
    console = Console(stderr=True, quiet=quiet, highlight=False)
    if quiet:
        yield lambda report: None
        return
    if console.is_terminal:
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        bars = Progress(*columns, TextColumn("{task.description}"), console=console)
        task = bars.add_task("", total=steps)

        def draw(report: StepReport) -> None:
            bars.start()
            bars.update(task, completed=report.step, description=_describe(report))

        try:
            yield draw
        finally:
            bars.stop()
        return
    began, sums = time.monotonic(), list[float]()

    def say(report: StepReport) -> None:
        sums.append(report.loss)
        if report.step % every == 0 or report.step == steps:
            mean, elapsed = sum(sums) / len(sums), time.monotonic() - began
            sums.clear()
            click.echo(f"step {report.step}/{steps} mean {mean:.4f} {_describe(report)} {elapsed:.0f} s", err=True)

    yield say


def _describe(report: StepReport) -> str:
    losses = " ".join(f"{task} {loss:.4f}" for task, loss in report.losses.items())
    return f"loss {report.loss:.4f} ({losses}) lr {report.learning_rate:.2e} {report.seconds:.2f} s/step"
