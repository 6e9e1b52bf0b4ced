"""One picture that is asked for, and what may be asked of a task: nothing missing, and nothing without effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from mtu_compile.core.errors import ConfigError, MtuError
from mtu_compile.core.families import Family
from mtu_compile.core.fit import Fit
from mtu_compile.core.guidance import ROWS
from mtu_compile.core.sizes import Offset, Size, Sizes
from mtu_compile.core.tasks import MAX_SCALE, Task
from mtu_compile.runtime.masks import MaskMode


@dataclass(frozen=True, eq=False)
class Request:
    """What one picture is made from; see ``Runtime.run``.

    Attributes:
        task: name of one of the bundle's tasks.
        prompt: what to show, or the instruction of an edit.
        negative_prompt: takes the place of the empty prompt in guidance.
        image: source picture of a task that has one; any size.
        mask: where to repaint, for tasks with a mask, see ``mask_mode``; it is laid over ``image``.
        seed: of the initial noise, and of what samplers with fresh noise draw on the way.
        steps: UNet evaluations (some samplers have more: ``Runtime.calls``); the bundle's default for the task
            otherwise.
        guidance_scale, image_guidance_scale: the task's own by default; at 1 or less there is no guidance.
        scheduler: one of ``schedulers.NAMES``; the model's own by default.
        latents: [1, C, h, w], initial noise of unit variance instead of the seed's.
        fit: what becomes of a picture of other proportions than the bundle's (``fitting``); the bundle's own way by
            default. The result always has the bundle's size; ``Result.frame`` says where in it the source is.
        mask_mode: what of ``mask`` selects (``masks``).
        paste_unmasked: for tasks with a mask, take what lies outside it from ``image``.
        original_size, crops_coords_top_left, target_size: what a UNet of SDXL is told, see ``mtu_compile.core.sizes``.
        step_cache: let fewer UNet calls be whole, where the bundle does.
    """

    task: str
    prompt: str = ""
    negative_prompt: str = ""
    image: Image.Image | Path | str | None = None
    mask: Image.Image | Path | str | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    image_guidance_scale: float | None = None
    scheduler: str | None = None
    latents: NDArray[Any] | None = None
    fit: Fit | None = None
    mask_mode: MaskMode = "auto"
    paste_unmasked: bool = True
    original_size: Size | None = None
    crops_coords_top_left: Offset | None = None
    target_size: Size | None = None
    step_cache: bool = True

    @property
    def sizes(self) -> Sizes:
        """What a UNet that is told sizes is told."""
        return Sizes(self.original_size, self.crops_coords_top_left, self.target_size)


def check_request(task: Task, request: Request, family: Family) -> None:
    """``ConfigError`` unless what is asked of ``task`` is what it takes, in a pipeline of ``family``."""
    request.sizes.check()
    request.sizes.require_taken(family)
    _check_condition(task, "picture", "image", request.image, bool({"image", "masked_image"} & set(task.condition)))
    _check_condition(task, "mask", "mask", request.mask, bool({"mask", "masked_image"} & set(task.condition)))
    if task.guidance != "none" and not request.prompt.strip():
        raise ConfigError(f"task {task.name!r} needs a prompt", hint="say what to show with --prompt")
    scale, image_scale = request.guidance_scale, request.image_guidance_scale
    useless = {
        "negative-prompt": task.guidance in ("none", "embedded") and request.negative_prompt != "",
        "guidance": task.guidance == "none" and scale is not None,
        "image-guidance": task.guidance != "text+image" and image_scale is not None,
    }
    for option, in_vain in useless.items():
        if in_vain:
            raise ConfigError(
                f"task {task.name!r} has guidance {task.guidance!r}, where --{option} has no effect",
                hint=f"leave --{option} away",
            )
    for value in (scale, image_scale):
        if value is not None and not 0 <= value <= MAX_SCALE:
            raise ConfigError(
                f"a guidance scale of {value:g} is impossible",
                hint=f"give a number from 0 to {MAX_SCALE}; 1 or less is no guidance",
            )
    unguided = all(row.prompt for row in ROWS[task.at(scale, image_scale).guidance])
    if request.negative_prompt and unguided:
        raise ConfigError(
            f"task {task.name!r} has no guidance at these scales, where --negative-prompt has no effect",
            hint="leave --negative-prompt away, or give --guidance more than 1",
        )


@contextmanager
def called(place: str) -> Iterator[None]:
    """Errors say which of several requests they are about: ``request 2: task 't2i' needs a prompt``."""
    try:
        yield
    except MtuError as error:
        if place:
            error.message = f"{place}: {error.message}"
            error.args = (error.message,)
        raise


def _check_condition(task: Task, what: str, option: str, given: object, needed: bool) -> None:
    if needed and given is None:
        raise ConfigError(f"task {task.name!r} needs a {what}", hint=f"give one with --{option}")
    if not needed and given is not None:
        raise ConfigError(f"task {task.name!r} has no use for a {what}", hint=f"leave --{option} away")
