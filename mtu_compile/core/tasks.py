"""Tasks are data: what a task is called, what its condition channels hold, and how it is guided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from mtu_compile.core.errors import ConfigError
from mtu_compile.core.guidance import ROWS, Guidance, active_guidance
from mtu_compile.core.schema import Length, Mismatch, Range, Rule, conform, field_types, show

Fill = Literal["image", "masked_image", "mask"]


def _is_name(name: str) -> bool:
    return name.replace("-", "").replace("_", "").isalnum() and len(name.encode()) <= 64


#: Names of folders and files are made of it, which most file systems end at 255 bytes.
TaskName = Annotated[str, Rule(_is_name, "letters, digits, '-' and '_', 64 bytes of them at most")]

#: Scales in use go up to 20 or so.
MAX_SCALE = 1000
Scale = Annotated[float, Range(0, MAX_SCALE)]


@dataclass(frozen=True)
class Task:
    """One task of a multi-task upcycled UNet.

    Attributes:
        name: how the task is asked for.
        condition: what is channel-concatenated to the noisy latent, in this order: ``"image"`` and
            ``"masked_image"`` are latents (``latent_channels`` channels), ``"mask"`` is one channel at latent size.
        guidance: the kind of classifier-free guidance, which with the scales fixes how many UNet samples one picture
            takes. ``"embedded"`` is that of latent consistency models: the UNet takes the scale as an input, and one
            sample.
        guidance_scale: default scale of the text direction; 1 or less is no classifier-free guidance, as in diffusers.
        image_guidance_scale: default scale of the image direction (``"text+image"`` only).
        downscale: for super-resolution, how many times smaller the input picture is than the output.
        class_label: what a UNet with class labels is told in this task; ``None`` for a UNet without.
    """

    name: TaskName
    condition: Annotated[tuple[Fill, ...], Length(0, 8)] = ()
    guidance: Guidance = "text"
    guidance_scale: Scale = 1.0
    image_guidance_scale: Scale = 1.0
    downscale: Annotated[int, Range(1, 64)] | None = None
    class_label: Annotated[int, Range(0, 1 << 20)] | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            conform(field_types(Task)[one.name], getattr(self, one.name), one.name)
        if self.guidance == "text+image" and not self.condition:
            raise Mismatch("guidance", show(self.guidance), "a condition beside guidance by text and image")

    def condition_channels(self, latent_channels: int) -> int:
        """How many channels the condition adds to the UNet's input."""
        return sum(1 if fill == "mask" else latent_channels for fill in self.condition)

    @property
    def guided(self) -> Guidance:
        """The guidance that the default scales leave active, which compiled graphs are made for."""
        return active_guidance(self.guidance, self.guidance_scale, self.image_guidance_scale)

    @property
    def unet_batch(self) -> int:
        """UNet samples a step for one picture: 2 for active guidance by text, 3 by text and image, else 1."""
        return len(ROWS[self.guided])

    def at(self, guidance_scale: float | None, image_guidance_scale: float | None) -> Task:
        """The task as it is run at these scales (``None`` for its own): with no more guidance than they leave."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        image_scale = self.image_guidance_scale if image_guidance_scale is None else image_guidance_scale
        left = active_guidance(self.guidance, scale, image_scale)
        return replace(self, guidance=left, guidance_scale=float(scale), image_guidance_scale=float(image_scale))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "condition": list(self.condition)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        """The task a JSON object describes; ``Mismatch``, a ``ModelError``, naming the key that is wrong."""
        task = conform(cls, data)
        assert isinstance(task, cls)
        return task


def _are_distinct(tasks: tuple[Task, ...]) -> bool:
    return len({task.name for task in tasks}) == len(tasks)


#: What a UNet's config and a tasks file hold.
Tasks = Annotated[tuple[Task, ...], Rule(_are_distinct, "a list of tasks with a name each of their own"), Length(1, 64)]


#: The paper's four tasks with its guidance scales (Chavhan et al., ICML 2025, section 4.1).
PAPER_TASKS: tuple[Task, ...] = (
    Task("t2i", (), "text", 7.5),
    Task("edit", ("image",), "text+image", 7.5, 1.6),
    Task("sr", ("image",), "none", downscale=4),
    Task("inpaint", ("mask", "masked_image"), "text+image", 4.0, 1.5),
)


def find_task(tasks: Iterable[Task], name: str) -> tuple[int, Task]:
    """Index and description of the task called ``name``; ``ConfigError`` naming the known ones otherwise."""
    known = tuple(tasks)
    for index, task in enumerate(known):
        if task.name == name:
            return index, task
    raise ConfigError(f"unknown task {name!r}", hint=f"this model knows {', '.join(t.name for t in known)}")
