"""The pipeline of every task, on compiled engines and numpy alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtu_compile import bundle
from mtu_compile.bundle import Manifest, TaskEntry
from mtu_compile.core.errors import ConfigError
from mtu_compile.core.fit import Fit
from mtu_compile.core.guidance import ROWS
from mtu_compile.core.noise import initial_noise, step_noise
from mtu_compile.core.notices import Notice
from mtu_compile.core.seeds import check_seed
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.runtime import guidance, images, proven, schedulers
from mtu_compile.runtime.denoise import Progress, denoise
from mtu_compile.runtime.engine import Engine
from mtu_compile.runtime.fitting import Frame
from mtu_compile.runtime.masks import MaskMode, check_selection, read_mask
from mtu_compile.runtime.networks import Networks, Opener
from mtu_compile.runtime.request import check_request

Array = NDArray[Any]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run gives back.

    Attributes:
        image: the picture, RGB.
        latents: [1, C, h, w] float32, the final latent it was decoded from.
        frame: which part of the source picture was used, and where in ``image`` it is; ``None`` without a source.
        notices: what may not be as it was meant: words beyond the text encoder's length, a mask that selects nothing.
    """

    image: Image.Image
    latents: Array
    frame: Frame | None = None
    notices: tuple[Notice, ...] = ()


@dataclass(frozen=True)
class Condition:
    """A task's condition at the size of the output.

    Attributes:
        channels: [1, c, h, w] float32, as concatenated to the noisy latent.
        picture: the source picture, RGB.
        mask: [H, W], 1 where to repaint.
        frame: how the source picture was fitted.
        notices: what there is to say of the mask.
    """

    channels: Array | None
    picture: Image.Image | None
    mask: Array | None
    frame: Frame | None
    notices: tuple[Notice, ...]


def load(path: Path | str, verify: bool = True, *, opener: Opener | None = None, warn: bool = True) -> Runtime:
    """A bundle, ready to run.

    Args:
        path: the bundle's folder.
        verify: compare every file with its hash first.
        opener: opens the bundle's networks; as the bundle says if not given.
        warn: log a warning if the bundle was not proven at this CPU's instruction set.

    Raises:
        BundleError: the bundle is not whole, or not as it was built.
    """
    # Engines are opened later: a link that is switched to another version meanwhile must not lead to its files.
    root = Path(path).resolve()
    manifest = bundle.read(root, verify=verify)
    if warn and (message := proven.warning(root, manifest)):
        _log.warning(message)
    return Runtime(root, manifest, opener)


class Runtime:
    """Runs the tasks of one bundle. Engines are opened when first needed, and kept.

    Not for several threads at once: an engine has one request.
    """

    def __init__(self, root: Path, manifest: Manifest, opener: Opener | None = None) -> None:
        self.manifest = manifest
        self.networks = Networks(root, manifest, opener)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The bundle's tasks."""
        return tuple(entry.task for entry in self.manifest.tasks.values())

    def steps(self, task: str, steps: int | None = None) -> int:
        """Denoising steps of a run: ``steps``, or what the bundle does by default."""
        return self._entry(task).default_steps if steps is None else steps

    def calls(self, task: str, steps: int | None = None, scheduler: str | None = None) -> int:
        """How often the sampler calls the UNet in a run of ``steps``; ``ConfigError`` for impossible steps."""
        sampler = schedulers.from_config(self.manifest.scheduler, self.steps(task, steps), scheduler)
        return len(sampler.timesteps)

    def run(
        self,
        task: str,
        prompt: str = "",
        *,
        negative_prompt: str = "",
        image: Image.Image | Path | str | None = None,
        mask: Image.Image | Path | str | None = None,
        seed: int = 0,
        steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        scheduler: str | None = None,
        latents: Array | None = None,
        fit: Fit | None = None,
        mask_mode: MaskMode = "auto",
        paste_unmasked: bool = True,
        progress: Progress | None = None,
        notify: Callable[[Notice], None] | None = None,
    ) -> Result:
        """Make one picture.

        Args:
            task: name of one of the bundle's tasks.
            prompt: what to show, or the instruction of an edit.
            negative_prompt: takes the place of the empty prompt in guidance.
            image: source picture of a task that has one; any size.
            mask: where to repaint, for tasks with a mask, see ``mask_mode``; it is laid over ``image``.
            seed: of the initial noise, and of what samplers with fresh noise draw on the way.
            steps: UNet evaluations (some samplers have more: ``calls``); the bundle's default for the task otherwise.
            guidance_scale, image_guidance_scale: the task's own by default; at 1 or less there is no guidance.
            scheduler: one of ``schedulers.NAMES``; the model's own by default.
            latents: [1, C, h, w], initial noise of unit variance instead of the seed's.
            fit: what becomes of a picture of other proportions than the bundle's (``fitting``); the bundle's own way by
                default. The result always has the bundle's size; ``Result.frame`` says where in it the source is.
            mask_mode: what of ``mask`` selects (``masks``).
            paste_unmasked: for tasks with a mask, take what lies outside it from ``image``.
            progress: told of every step.
            notify: told of each of ``Result.notices``, before the first step.

        Raises:
            ConfigError: an unknown task, sampler, seed, fit or mask mode; a prompt, picture or mask that the task needs
                and was not given, or was given and the task cannot use.
            InputError: ``image`` or ``mask`` is not a picture.
            ToolchainMissing, TargetError: an engine cannot be opened or run.
            NotFiniteError: a network's output has NaN or Inf values; names network and step.
        """
        entry = self._entry(task)
        spec = entry.task
        check_request(spec, prompt, negative_prompt, image, mask, guidance_scale, image_guidance_scale)
        noise = self._noise(check_seed(seed), latents)
        sampler = schedulers.from_config(self.manifest.scheduler, self.steps(task, steps), scheduler)
        spec = spec.at(guidance_scale, image_guidance_scale)

        condition = self._condition(spec, image, mask, fit or self.manifest.fit, mask_mode)
        cost = guidance.batch_notice(len(ROWS[spec.guidance]), entry.task.unet_batch)
        costs = () if cost is None else (cost,)
        notices = (*self._cut_prompts(spec, prompt, negative_prompt), *condition.notices, *costs)
        if notify is not None:
            for notice in notices:
                notify(notice)
        embeddings = self._embed(spec, prompt, negative_prompt)
        draw = partial(step_noise, seed) if sampler.draws_noise else None
        unet = self.unet(task)
        final = denoise(
            unet, self.manifest, entry, spec, sampler, noise, draw, condition.channels, embeddings, progress
        )
        picture = self.networks.decode_picture(final)
        if paste_unmasked and condition.mask is not None and condition.picture is not None:
            picture = images.paste(picture, condition.picture, condition.mask)
        return Result(picture, final, condition.frame, notices)

    def unet(self, task: str) -> Engine:
        """The UNet of ``task``; opened and kept. ``BundleError`` if it is not what the manifest describes."""
        return self.networks.unet(self._entry(task))

    def close(self) -> None:
        """Free all engines; a later run opens them again."""
        self.networks.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _entry(self, task: str) -> TaskEntry:
        find_task(self.tasks, task)  # says which tasks there are if there is no such
        return self.manifest.tasks[task]

    def _noise(self, seed: int, latents: Array | None) -> Array:
        shape = (1, self.manifest.latent_channels, *self.manifest.latent_size)
        if latents is not None:
            if latents.shape != shape:
                raise ConfigError(f"latents have the shape {latents.shape}", hint=f"this bundle takes {shape}")
            return np.asarray(latents, dtype=np.float32)
        return initial_noise(seed, shape)

    def _condition(
        self,
        task: Task,
        image: Image.Image | Path | str | None,
        mask: Image.Image | Path | str | None,
        fit: Fit,
        mask_mode: MaskMode,
    ) -> Condition:
        size, frame, picture, selected, notices = self.manifest.image_size, None, None, None, tuple[Notice, ...]()
        if image is not None:
            opened = images.open_image(image)
            frame = Frame.of(opened.size, size, fit)
            picture = frame.picture(opened)
        if mask is not None:
            black_and_white, notices = read_mask(images.open_mask(mask), mask_mode)
            selected = (frame or Frame.of(black_and_white.size, size, fit)).mask(black_and_white)
            notices += check_selection(selected, images.shrink_mask(selected, self.manifest.latent_size))
        pieces = []
        for fill in task.condition:
            if fill == "mask":
                assert selected is not None
                pieces.append(images.shrink_mask(selected, self.manifest.latent_size)[None, None])
                continue
            assert picture is not None
            pixels = images.to_array(picture)
            if fill == "masked_image":
                assert selected is not None
                pixels *= 1 - selected
            pieces.append(self.networks.encode_picture(pixels))
        channels = np.concatenate(pieces, axis=1) if pieces else None
        return Condition(channels, picture, selected, frame, notices)

    def _embed(self, task: Task, prompt: str, negative_prompt: str) -> Array:
        """Text embeddings [b, L, D] in the order of the guidance batch."""
        wanted = [prompt if row.prompt else negative_prompt for row in ROWS[task.guidance]]
        distinct = list(dict.fromkeys(wanted))
        embeddings = dict(zip(distinct, self.networks.encode_text(distinct), strict=True))
        return np.stack([embeddings[text] for text in wanted])

    def _cut_prompts(self, task: Task, prompt: str, negative_prompt: str) -> tuple[Notice, ...]:
        """Of each prompt that the task looks at and that is too long: what it loses."""
        found = []
        for is_prompt in sorted({row.prompt for row in ROWS[task.guidance]}, reverse=True):
            what, text = ("prompt", prompt) if is_prompt else ("negative prompt", negative_prompt)
            if (cut := self.networks.tokenizer.cut(text)) is not None:
                found.append(cut.notice(what))
        return tuple(found)
