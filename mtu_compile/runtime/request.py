"""What may be asked of a task: nothing missing, and nothing that would silently have no effect."""

from __future__ import annotations

from mtu_compile.core.errors import ConfigError
from mtu_compile.core.guidance import ROWS
from mtu_compile.core.tasks import MAX_SCALE, Task


def check_request(
    task: Task,
    prompt: str,
    negative_prompt: str,
    image: object,
    mask: object,
    guidance_scale: float | None,
    image_guidance_scale: float | None,
) -> None:
    """``ConfigError`` unless the arguments of ``Runtime.run`` are what ``task`` takes."""
    _check_condition(task, "picture", "image", image, bool({"image", "masked_image"} & set(task.condition)))
    _check_condition(task, "mask", "mask", mask, bool({"mask", "masked_image"} & set(task.condition)))
    if task.guidance != "none" and not prompt.strip():
        raise ConfigError(f"task {task.name!r} needs a prompt", hint="say what to show with --prompt")
    useless = {
        "negative-prompt": task.guidance in ("none", "embedded") and negative_prompt != "",
        "guidance": task.guidance == "none" and guidance_scale is not None,
        "image-guidance": task.guidance != "text+image" and image_guidance_scale is not None,
    }
    for option, in_vain in useless.items():
        if in_vain:
            raise ConfigError(
                f"task {task.name!r} has guidance {task.guidance!r}, where --{option} has no effect",
                hint=f"leave --{option} away",
            )
    for value in (guidance_scale, image_guidance_scale):
        if value is not None and not 0 <= value <= MAX_SCALE:
            raise ConfigError(
                f"a guidance scale of {value:g} is impossible",
                hint=f"give a number from 0 to {MAX_SCALE}; 1 or less is no guidance",
            )
    unguided = all(row.prompt for row in ROWS[task.at(guidance_scale, image_guidance_scale).guidance])
    if negative_prompt and unguided:
        raise ConfigError(
            f"task {task.name!r} has no guidance at these scales, where --negative-prompt has no effect",
            hint="leave --negative-prompt away, or give --guidance more than 1",
        )


def _check_condition(task: Task, what: str, option: str, given: object, needed: bool) -> None:
    if needed and given is None:
        raise ConfigError(f"task {task.name!r} needs a {what}", hint=f"give one with --{option}")
    if not needed and given is not None:
        raise ConfigError(f"task {task.name!r} has no use for a {what}", hint=f"leave --{option} away")
