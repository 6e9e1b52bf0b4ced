"""Tasks are data: what a task is called, what its condition channels hold, and how it is guided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mtu_compile.core.errors import ConfigError, ModelError

Fill = Literal["image", "masked_image", "mask"]
Guidance = Literal["none", "text", "text+image"]


@dataclass(frozen=True)
class Task:
    """One task of a multi-task upcycled UNet.

    Attributes:
        name: how the task is asked for.
        condition: what is channel-concatenated to the noisy latent, in this order: ``"image"`` and
            ``"masked_image"`` are latents (``latent_channels`` channels), ``"mask"`` is one channel at latent size.
        guidance: the kind of classifier-free guidance, which also fixes how many UNet samples one picture takes.
        guidance_scale: default scale of the text direction.
        image_guidance_scale: default scale of the image direction (``"text+image"`` only).
        downscale: for super-resolution, how many times smaller the input picture is than the output.
    """

    name: str
    condition: tuple[Fill, ...] = ()
    guidance: Guidance = "text"
    guidance_scale: float = 1.0
    image_guidance_scale: float = 1.0
    downscale: int | None = None

    def __post_init__(self) -> None:
        if not self.name.replace("-", "").replace("_", "").isalnum():
            raise ModelError(f"task name {self.name!r} is not made of letters, digits, '-' and '_'")
        if unknown := set(self.condition) - set(get_args(Fill)):
            raise ModelError(f"task {self.name!r}: unknown condition {sorted(unknown)}; known: {get_args(Fill)}")
        if self.guidance not in get_args(Guidance):
            raise ModelError(f"task {self.name!r}: unknown guidance {self.guidance!r}; known: {get_args(Guidance)}")
        if self.guidance == "text+image" and not self.condition:
            raise ModelError(f"task {self.name!r}: guidance 'text+image' needs a condition")

    def condition_channels(self, latent_channels: int) -> int:
        """How many channels the condition adds to the UNet's input."""
        return sum(1 if fill == "mask" else latent_channels for fill in self.condition)

    @property
    def unet_batch(self) -> int:
        """UNet samples a step for one picture: 1 without guidance, 2 for text, 3 for text and image."""
        return {"none": 1, "text": 2, "text+image": 3}[self.guidance]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "condition": list(self.condition)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Task:
        try:
            return cls(**{**data, "condition": tuple(data.get("condition", ()))})
        except TypeError as error:
            raise ModelError(f"task description {dict(data)!r} is not understood: {error}") from error


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
