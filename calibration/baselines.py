"""Calibration as others do it, to measure against. Nothing here is used by a build.

What is compared with are habits, not tools: the same quantiser gets the same number of UNet calls, and only where they
come from differs. ``CalibrationSet.verify`` refuses what is made here wherever pictures or trajectories are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calibration.capture import capture
from calibration.samples import Sample
from calibration.sets import CalibrationSet
from mtu_compile.core.errors import CalibrationError
from mtu_compile.core.tasks import Task

#: Strategies of the sets made here.
PROMPTS_ONLY = "prompts only"
RANDOM_NUMBERS = "random numbers"

#: What the pipelines ask for where the task has a condition; the UNet never sees it.
_BLANK = Image.new("RGB", (8, 8), "white")


def prompts_only(pipeline: Any, task: Task, samples: Sequence[Sample], **options: Any) -> CalibrationSet:
    """Real denoising of the samples' prompts, with the condition channels zero: no picture, no mask.

    NVIDIA Model-Optimizer's diffusers example does so: ``Calibrator.run_calibration`` of
    ``examples/diffusers/quantization/quantize.py`` hands a text-to-image pipeline prompts of a data set and nothing
    else (30 steps, all of them). Its pipelines have no condition channels: this is what text alone comes to where there
    are some. For a task without a condition it is ``capture``; for one that is not guided by text, denoising without
    any information.

    Options and errors are those of ``calibration.capture.capture``.
    """
    plain = [Sample(sample.prompt, *_blanks(task)) for sample in samples]
    with _zero_condition(pipeline):
        made = capture(pipeline, task, plain, **options)
    return replace(made, strategy=PROMPTS_ONLY)


def random_set(
    graph: Path,
    *,
    task: str,
    model_sha256: str,
    calls: int,
    seed: int = 0,
    train_timesteps: int = 1000,
) -> CalibrationSet:
    """Standard normal latents, conditions and text, at timesteps drawn uniformly: no model was asked.

    NVIDIA Model-Optimizer's ONNX quantisation does so where it is given no data ("Random calibration inputs are used
    when no calibration dataset is provided", its guide "ONNX Quantization - Linux"), and Intel Neural Compressor's ONNX
    example of a diffusion UNet says of itself that it uses dummy data (``examples/onnxrt/image_recognition/unet``).

    Args:
        graph: the static graph the set is for; its inputs' shapes are taken.
        calls: how many.
        train_timesteps: timesteps are drawn from 0 … this - 1.

    Raises:
        CalibrationError: an input of ``graph`` has a dynamic shape.
        ModelError: ``graph`` is unreadable.
    """
    rng = np.random.default_rng(seed)
    shapes = _input_shapes(graph)
    inputs = []
    for _ in range(calls):
        call = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
        call["timestep"] = np.full(shapes["timestep"], rng.integers(train_timesteps), np.float32)
        inputs.append(call)
    return CalibrationSet(
        task=task,
        model_sha256=model_sha256,
        inputs=tuple(inputs),
        timesteps=tuple(float(call["timestep"].flat[0]) for call in inputs),
        trajectories=tuple(range(calls)),
        prompts=("",) * calls,
        seeds=(seed,) * calls,
        scheduler={"_class_name": "none"},
        producer={"numpy": np.__version__},
        strategy=RANDOM_NUMBERS,
    )


def _blanks(task: Task) -> tuple[Image.Image | None, Image.Image | None]:
    """Picture and mask, where the task takes them."""
    image = _BLANK if {"image", "masked_image"} & set(task.condition) else None
    mask = _BLANK.convert("L") if {"mask", "masked_image"} & set(task.condition) else None
    return image, mask


@contextmanager
def _zero_condition(pipeline: Any) -> Iterator[None]:
    """Let the UNet, and who watches it, see zeros behind the noisy latent."""
    channels = int(pipeline.unet.latent_channels)

    def clear(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        named["sample"][:, channels:] = 0  # in place: the pipeline shows the same tensor to its observers

    handle = pipeline.unet.register_forward_pre_hook(clear, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _input_shapes(graph: Path) -> dict[str, tuple[int, ...]]:
    from mtu_compile.graph import io as graph_io

    proto = graph_io.load_proto(graph).graph
    constants = {tensor.name for tensor in proto.initializer}
    shapes = {}
    for value in proto.input:
        if value.name in constants:
            continue
        dims = value.type.tensor_type.shape.dim
        if not all(dim.HasField("dim_value") for dim in dims):
            raise CalibrationError(
                f"input {value.name!r} of {graph.name} has a dynamic shape", hint="specialise it first"
            )
        shapes[value.name] = tuple(int(dim.dim_value) for dim in dims)
    return shapes
