"""Which parts of a pipeline float16 holds: text encoder and autoencoder, on what the float original gave them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.merged import TaskCall
from mtu_compile.accuracy.host.half_range import (
    Feed,
    HalfRange,
    computes_in_half,
    half_range,
    half_ranges,
    part_precision,
    require_half,
)
from mtu_compile.runtime import images
from mtu_compile.runtime.fitting import fit_picture
from mtu_compile.runtime.reference import Reference
from mtu_compile.stages.job import Checkpoint, Model, Specialised
from mtu_compile.stages.on_target import OnTarget
from mtu_compile.stages.opened import open_pipeline
from mtu_compile.steps import Steps, Work, step
from targets.base import Precision, Target

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

#: Inputs each part is tried on; pictures and prompts of all tasks in turn.
FEEDS = 4

#: UNet calls each task is tried on: an early, a middle and a late one.
CALLS = 3


#: What runs the graphs that round.
TOOLS = ("onnx", "onnx-ir", "onnxruntime", "transformers", "tokenizers", "numpy")


def parts_in_half(
    steps: Steps,
    target: Target,
    precision: Precision,
    model: Model,
    graphs: Mapping[str, Path],
    references: Sequence[Path],
) -> dict[str, tuple[Precision, HalfRange | None]]:
    """By part, the precision it is built in, and how far its numbers go where that was asked.

    Args:
        target, precision: what the UNets beside the parts are built for and in.
        model: the float original.
        graphs: by part, its float graph.
        references: what the original made of each task, which the parts are tried on.

    Raises:
        NotFiniteError: a part overflows float16, and the target has no wider type.
    """
    wanted = target.companion_precision(precision)
    if wanted != "fp16":
        return dict.fromkeys(graphs, (wanted, None))
    title = "numbers of the other networks"
    measured = steps.run(part_ranges.of(title, model.checkpoint, graphs, tuple(references), model.size))
    return {
        name: (wanted, None) if found is None else (part_precision(name, found, target.spec), found)
        for name, found in measured.items()
    }


@step(tools=TOOLS, cpu=True)
def part_ranges(
    work: Work,
    checkpoint: Checkpoint,
    graphs: Mapping[str, Path],
    references: tuple[Path, ...],
    size: tuple[int, int],
) -> Mapping[str, HalfRange | None]:
    """By part, how far its numbers go; ``None`` where no task has a picture to encode."""
    with work.progress.stage("numbers of the other networks"):
        feeds = _feeds(open_pipeline(checkpoint), [Reference.load(path) for path in references], size)
        return {
            name: _finite(half_range(graph, feeds[name], work.folder)) if feeds[name] else None
            for name, graph in graphs.items()
        }


def unet_in_half(
    steps: Steps,
    here: OnTarget,
    precision: Precision,
    unet: Specialised,
    graph: Path,
    references: Mapping[str, Path],
    *,
    judge: bool,
) -> Mapping[str, HalfRange]:
    """By task, how far the numbers of a UNet's lowered graph go; nothing where the device does not compute in float16.

    Args:
        unet: the UNet that ``graph`` was made of.
        references: by task, file of what the original made of it.
        judge: refuse what goes further than float16.

    Raises:
        NotFiniteError: further than float16, and ``judge``.
    """
    if not computes_in_half(here.target.spec, precision):
        return {}
    return steps.run(unet_ranges.of(f"numbers {unet.label}", here, unet, graph, references, judge))


@step(tools=TOOLS, cpu=True)
def unet_ranges(
    work: Work, here: OnTarget, unet: Specialised, graph: Path, references: Mapping[str, Path], judge: bool
) -> Mapping[str, HalfRange]:
    """``unet_in_half`` where the device computes in float16."""
    found = {}
    with (
        work.progress.stage(f"numbers {unet.label}", len(unet.tasks)) as advance,
        half_ranges(graph, work.folder) as measure,
    ):
        for task_id, task in unet.tasks.items():
            trajectories = Reference.load(references[task.name]).trajectories[:1]
            calls = [(number, step) for one in trajectories for number, step in enumerate(one.inputs, start=1)]
            picked = [calls[i] for i in sorted({round(i) for i in np.linspace(0, len(calls) - 1, CALLS)})]
            feeds = [
                TaskCall(task.name, task_id, task.guided, unet.width, step) if unet.shared else step
                for _, step in picked
            ]
            measured = measure(feeds)
            where = [(number, float(step["timestep"][0])) for number, step in picked]
            if judge:
                require_half(measured, task.name, here.target.spec, where, len(calls))
            found[task.name] = _finite(measured)
            advance(1)
    return found


def _finite(found: HalfRange) -> HalfRange:
    """As it is kept: JSON has no infinite numbers."""
    return HalfRange(**found.to_json())


def _feeds(pipeline: MTUPipeline, references: Sequence[Reference], size: tuple[int, int]) -> dict[str, list[Feed]]:
    """Inputs of each part, by the part's name."""
    made = [one for group in zip(*(reference.trajectories for reference in references), strict=False) for one in group]
    made = made[:FEEDS]
    scale = np.float32(pipeline.vae.config.scaling_factor)
    texts = pipeline.texts
    tokens = texts.tokens(["", *(one.prompt for one in made)])
    pictures = [images.to_array(fit_picture(one.image, size)) for one in made if one.image is not None]
    return {
        **{
            branch.encoder: [{"input_ids": row[None]} for row in ids.numpy().astype(np.int64)]
            for (branch, _), ids in zip(texts.branches(), tokens, strict=True)
        },
        "vae_encoder": [{"sample": pixels} for pixels in pictures],
        "vae_decoder": [{"latent_sample": one.latents / scale} for one in made],
    }
