"""What the input channels of a pretrained UNet hold: the noisy latent, and for some models a condition after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mtu_compile.core.errors import ModelError
from mtu_compile.core.tasks import Fill, Task

#: Condition channels by pipeline class, in the order in which diffusers 0.42 concatenates them.
INPAINTING: tuple[Fill, ...] = ("mask", "masked_image")
EDITING: tuple[Fill, ...] = ("image",)
CONDITIONS: Mapping[str, tuple[Fill, ...]] = {
    "StableDiffusionInpaintPipeline": INPAINTING,
    "StableDiffusionXLInpaintPipeline": INPAINTING,
    "StableDiffusionInstructPix2PixPipeline": EDITING,
    "StableDiffusionXLInstructPix2PixPipeline": EDITING,
}


@dataclass(frozen=True)
class InputChannels:
    """The input of a pretrained UNet.

    Attributes:
        latent: channels of the noisy latent, which come first.
        condition: what the others hold.
        scale: weights of the condition's latents are multiplied with this. The tasks give every latent scaled by the
            autoencoder's ``scaling_factor``; InstructPix2Pix was trained on unscaled ones.
    """

    latent: int
    condition: tuple[Fill, ...] = ()
    scale: float = 1.0

    def widths(self) -> list[tuple[Fill, int]]:
        """Each part of the condition with its channels."""
        return [(fill, 1 if fill == "mask" else self.latent) for fill in self.condition]

    def serves(self, task: Task) -> bool:
        """Whether ``task`` has all of the condition, in whichever order."""
        return set(self.condition) <= set(task.condition)

    def weight_for(self, task: Task, weight: Tensor, target: Tensor) -> Tensor:
        """The pretrained input convolution as one for ``task``.

        Args:
            weight: [C0, latent + condition, k, k].
            target: [C0, latent + the task's condition, k, k]; gives shape and dtype.

        Returns:
            As ``target``: the latent's channels, and for a task with the condition the condition's where the task has
            them. What the pretrained UNet does not know starts at zero.
        """
        result = target.new_zeros(target.shape)
        result[:, : self.latent] = weight[:, : self.latent]
        if not self.serves(task):
            return result
        starts = dict(_starts([(fill, 1 if fill == "mask" else self.latent) for fill in task.condition], self.latent))
        for (fill, start), (_, width) in zip(_starts(self.widths(), self.latent), self.widths(), strict=True):
            part = weight[:, start : start + width]
            part = part if fill == "mask" else part * self.scale
            result[:, starts[fill] : starts[fill] + width] = part
        return result


def _starts(widths: Sequence[tuple[Fill, int]], first: int) -> list[tuple[Fill, int]]:
    """Each part with its first channel; the parts lie one after the other from channel ``first``."""
    found = []
    for fill, width in widths:
        found.append((fill, first))
        first += width
    return found


def input_channels(
    unet: Mapping[str, Any], pipeline: str | None = None, vae: Mapping[str, Any] | None = None, *, scaled: bool = False
) -> InputChannels:
    """What the UNet of a pipeline takes.

    Args:
        unet: config of the UNet.
        pipeline: class of the pipeline, which says what channels beyond the latent's hold.
        vae: config of the autoencoder.
        scaled: pictures are scaled like latents even where the pipeline's class says otherwise (``is_cosxl_edit``).

    Raises:
        ModelError: channels nobody has described.
    """
    latent, channels = int(unet.get("out_channels", 4)), int(unet.get("in_channels", 4))
    if channels == latent:
        return InputChannels(latent)
    condition = CONDITIONS.get(pipeline or "", ())
    found = InputChannels(latent, condition)
    if not condition or latent + sum(width for _, width in found.widths()) != channels:
        known = "; ".join(f"{name} ({', '.join(fills)})" for name, fills in CONDITIONS.items() if "XL" not in name)
        raise ModelError(
            f"the UNet takes {channels} channels (in_channels), not only the {latent} of a latent (out_channels), and "
            f"what a {pipeline or 'UNet'} puts into the others is not known",
            hint=f"UNets with a condition go in from pipelines of {known}",
        )
    vae = vae or {}
    if condition != EDITING or scaled:
        return found
    if vae.get("shift_factor"):
        raise ModelError(
            f"the autoencoder's shift_factor = {vae['shift_factor']!r} cannot be undone in the UNet's input",
            hint="an editing model of this kind is not supported",
        )
    return InputChannels(latent, condition, 1 / float(vae.get("scaling_factor", 0.18215)))


def check_tasks(channels: InputChannels, tasks: Sequence[Task]) -> None:
    """``ModelError`` if the UNet has a condition and no task does, which would throw away what it was trained for."""
    if channels.condition and not any(channels.serves(task) for task in tasks):
        wanted = ", ".join(channels.condition)
        raise ModelError(
            f"the UNet takes a condition ({wanted}), and none of the tasks has one",
            hint=f"choose a task whose condition is {wanted}: with --task, or with --tasks FILE",
        )
