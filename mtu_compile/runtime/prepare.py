"""From a request to what its picture starts from: noise, condition and text embeddings, and what there is to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtu_compile.bundle import Manifest, TaskEntry
from mtu_compile.core.errors import ConfigError
from mtu_compile.core.families import FAMILIES, TEXT_EMBEDS, TIME_IDS
from mtu_compile.core.guidance import ROWS
from mtu_compile.core.noise import initial_noise, step_noise
from mtu_compile.core.notices import Notice
from mtu_compile.core.seeds import check_seed
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.runtime import images, schedulers
from mtu_compile.runtime.denoise import Start
from mtu_compile.runtime.fitting import Frame
from mtu_compile.runtime.masks import check_selection, read_mask
from mtu_compile.runtime.networks import Networks
from mtu_compile.runtime.request import Request, called, check_request
from mtu_compile.runtime.text import Embedding

Array = NDArray[Any]


@dataclass(frozen=True)
class Asked:
    """A request that was found possible; nothing was opened for it yet.

    Attributes:
        request: what is asked for.
        entry: its task as the bundle has it.
        task: the task as it is run, see ``Start``.
        sampler: for its steps.
        noise: [1, C, h, w], of unit variance.
        place: which of several requests it is; empty for the only one.
    """

    request: Request
    entry: TaskEntry
    task: Task
    sampler: schedulers.Scheduler
    noise: Array
    place: str

    @property
    def samples(self) -> int:
        """UNet samples a step."""
        return len(ROWS[self.task.guidance])

    @property
    def timesteps(self) -> tuple[float, ...]:
        """What the UNet is told at each call."""
        return tuple(map(float, self.sampler.timesteps))


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


@dataclass(frozen=True)
class Prepared:
    """All a picture is made from.

    Attributes:
        start: what its denoising starts from.
        condition: its condition.
        notices: what may not be as it was meant.
    """

    start: Start
    condition: Condition
    notices: tuple[Notice, ...]


def ask(manifest: Manifest, request: Request, place: str = "") -> Asked:
    """Check a request without opening anything; ``ConfigError`` if it is impossible."""
    with called(place):
        find_task((entry.task for entry in manifest.tasks.values()), request.task)  # says which there are
        entry = manifest.tasks[request.task]
        check_request(entry.task, request, FAMILIES[manifest.family])
        steps = entry.default_steps if request.steps is None else request.steps
        noise = _noise(manifest, check_seed(request.seed), request.latents)
        sampler = schedulers.from_config(manifest.scheduler, steps, request.scheduler)
        task = entry.task.at(request.guidance_scale, request.image_guidance_scale)
    return Asked(request, entry, task, sampler, noise, place)


def prepare(networks: Networks, manifest: Manifest, asked: Asked) -> Prepared:
    """Encode a request's pictures and prompts; raises as ``Runtime.run``."""
    request, task, sampler = asked.request, asked.task, asked.sampler
    with called(asked.place):
        condition = _condition(networks, manifest, task, request)
        notices = (*_cut_prompts(networks, task, request), *condition.notices)
        embeddings = _embed(networks, manifest, task, request)
        added = _added(manifest, request, embeddings)
    draw = partial(step_noise, request.seed) if sampler.draws_noise else None
    states = np.stack([one.states for one in embeddings])
    cache = asked.entry.step_cache if request.step_cache else None
    start = Start(asked.entry, task, sampler, asked.noise, draw, condition.channels, states, asked.place, added, cache)
    return Prepared(start, condition, notices)


def _noise(manifest: Manifest, seed: int, latents: Array | None) -> Array:
    shape = (1, manifest.latent_channels, *manifest.latent_size)
    if latents is not None:
        if latents.shape != shape:
            raise ConfigError(f"latents have the shape {latents.shape}", hint=f"this bundle takes {shape}")
        return np.asarray(latents, dtype=np.float32)
    return initial_noise(seed, shape)


def _condition(networks: Networks, manifest: Manifest, task: Task, request: Request) -> Condition:
    size, fit = manifest.image_size, request.fit or manifest.fit
    frame, picture, selected, notices = None, None, None, tuple[Notice, ...]()
    if request.image is not None:
        opened = images.open_image(request.image)
        frame = Frame.of(opened.size, size, fit)
        picture = frame.picture(opened)
    if request.mask is not None:
        black_and_white, notices = read_mask(images.open_mask(request.mask), request.mask_mode)
        selected = (frame or Frame.of(black_and_white.size, size, fit)).mask(black_and_white)
        notices += check_selection(selected, images.shrink_mask(selected, manifest.latent_size))
    pieces = []
    for fill in task.condition:
        if fill == "mask":
            assert selected is not None
            pieces.append(images.shrink_mask(selected, manifest.latent_size)[None, None])
            continue
        assert picture is not None
        pixels = images.to_array(picture)
        if fill == "masked_image":
            assert selected is not None
            pixels *= 1 - selected
        pieces.append(networks.encode_picture(pixels))
    channels = np.concatenate(pieces, axis=1) if pieces else None
    return Condition(channels, picture, selected, frame, notices)


def _embed(networks: Networks, manifest: Manifest, task: Task, request: Request) -> list[Embedding]:
    """What each sample of the guidance batch is told of a prompt."""
    rows = ROWS[task.guidance]
    wanted = [request.prompt if row.prompt else request.negative_prompt for row in rows]
    distinct: Sequence[str] = list(dict.fromkeys(wanted))
    embeddings = dict(zip(distinct, networks.encode_text(distinct), strict=True))
    zeros = manifest.zeros_for_empty_prompt and not request.negative_prompt
    return [
        embeddings[text].zeros if zeros and not row.prompt else embeddings[text]
        for row, text in zip(rows, wanted, strict=True)
    ]


def _added(manifest: Manifest, request: Request, embeddings: Sequence[Embedding]) -> dict[str, Array]:
    """What UNets of the bundle's family are told beside the text, a row for each sample."""
    conditions, added = FAMILIES[manifest.family].conditions, dict[str, Array]()
    if TEXT_EMBEDS in conditions:
        added[TEXT_EMBEDS] = np.stack([one.pooled for one in embeddings if one.pooled is not None])
    if TIME_IDS in conditions:
        added[TIME_IDS] = np.tile(request.sizes.time_ids(manifest.image_size), (len(embeddings), 1))
    return added


def _cut_prompts(networks: Networks, task: Task, request: Request) -> tuple[Notice, ...]:
    """Of each prompt that the task looks at and that is too long: what it loses."""
    found = []
    for is_prompt in sorted({row.prompt for row in ROWS[task.guidance]}, reverse=True):
        what, text = ("prompt", request.prompt) if is_prompt else ("negative prompt", request.negative_prompt)
        if (cut := networks.tokenizer.cut(text)) is not None:
            found.append(cut.notice(what))
    return tuple(found)
