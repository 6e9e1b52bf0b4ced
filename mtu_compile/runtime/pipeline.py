"""The pipeline of every task, on compiled engines and numpy alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from mtu_compile import bundle
from mtu_compile.bundle import Manifest, TaskEntry
from mtu_compile.bundle.keys import PublicKey
from mtu_compile.core.fit import Fit
from mtu_compile.core.notices import Notice
from mtu_compile.core.sizes import Offset, Size
from mtu_compile.core.tasks import Task, find_task
from mtu_compile.runtime import guidance, images, proven, schedulers
from mtu_compile.runtime.batches import batch_of
from mtu_compile.runtime.denoise import Progress, Watch, denoise
from mtu_compile.runtime.engine import Engine
from mtu_compile.runtime.fitting import Frame
from mtu_compile.runtime.grouping import MOST_SAMPLES, alone_notice, group
from mtu_compile.runtime.masks import MaskMode
from mtu_compile.runtime.networks import Networks, Opener
from mtu_compile.runtime.prepare import Asked, Prepared, ask, prepare
from mtu_compile.runtime.preview import Preview
from mtu_compile.runtime.request import Request, called

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


def load(
    path: Path | str,
    verify: bool = True,
    *,
    opener: Opener | None = None,
    warn: bool = True,
    trusted: Sequence[PublicKey] | None = None,
) -> Runtime:
    """A bundle, ready to run.

    Args:
        path: the bundle's folder.
        verify: compare every file with its hash first.
        opener: opens the bundle's networks; as the bundle says if not given.
        warn: log a warning if the bundle was not proven at this CPU's instruction set.
        trusted: demand a signature by one of these keys (``bundle.keys.read_trusted``) before anything of it is read.

    Raises:
        BundleError: the bundle is not whole, or not as it was built; or not signed by anybody trusted.
    """
    # Engines are opened later: a link that is switched to another version meanwhile must not lead to its files.
    root = Path(path).resolve()
    manifest = bundle.read(root, verify=verify, trusted=trusted)
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
        original_size: Size | None = None,
        crops_coords_top_left: Offset | None = None,
        target_size: Size | None = None,
        step_cache: bool = True,
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
            original_size, crops_coords_top_left, target_size: what a UNet of SDXL is told (``mtu_compile.core.sizes``).
            step_cache: let fewer UNet calls be whole, where the bundle does; ``False`` for the picture without that.
            progress: told of every step.
            notify: told of each of ``Result.notices``, before the first step.

        Raises:
            ConfigError: an unknown task, sampler, seed, fit or mask mode; a prompt, picture or mask that the task needs
                and was not given, or was given and the task cannot use.
            InputError: ``image`` or ``mask`` is not a picture.
            ToolchainMissing, TargetError: an engine cannot be opened or run.
            NotFiniteError: a network's output has NaN or Inf values; names network and step.
        """
        request = Request(
            task,
            prompt,
            negative_prompt,
            image,
            mask,
            seed,
            steps,
            guidance_scale,
            image_guidance_scale,
            scheduler,
            latents,
            fit,
            mask_mode,
            paste_unmasked,
            original_size,
            crops_coords_top_left,
            target_size,
            step_cache,
        )
        asked = [ask(self.manifest, request)]
        tell = notify or _unheard
        (result,) = self._make(asked, [[0]], progress, lambda index, notice: tell(notice))
        return result

    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        most_samples: int = MOST_SAMPLES,
        progress: Progress | None = None,
        notify: Callable[[int, Notice], None] | None = None,
        preview: Preview | None = None,
    ) -> tuple[Result, ...]:
        """Make several pictures, of any tasks, each as ``run`` makes it.

        Where the bundle's tasks share one UNet, pictures whose samplers stop at the same timesteps (the same steps,
        and for most schedulers whichever of them) go through one UNet call a step. The others are made one after the
        other, and one of their notices says why.

        Args:
            requests: what is asked for.
            most_samples: UNet samples of one call at most, as memory grows with them; more take turns.
            progress: told of every step of every picture.
            notify: told of each of the notices, and of which request (from 0), before the first step.
            preview: told of every step of every picture, and given what makes the picture so far.

        Returns:
            The results, in the order of the requests.

        Raises:
            ConfigError, InputError, ToolchainMissing, TargetError, NotFiniteError: as ``run``, and with the number of
                the request, from 1. All are checked before the first step.
        """
        asked = self._ask(requests)
        groups = group(asked, shared=self.networks.shared, most=most_samples)
        return self._make(asked, groups, progress, notify or _unheard, preview)

    def batch_calls(self, requests: Sequence[Request]) -> int:
        """Steps of all pictures, which ``run_batch`` tells ``progress`` of; ``ConfigError`` for what is impossible."""
        return sum(len(one.sampler.timesteps) for one in self._ask(requests))

    def _ask(self, requests: Sequence[Request]) -> list[Asked]:
        places = [f"request {index}" if len(requests) > 1 else "" for index in range(1, len(requests) + 1)]
        return [ask(self.manifest, request, place) for request, place in zip(requests, places, strict=True)]

    def _make(
        self,
        asked: Sequence[Asked],
        groups: Sequence[Sequence[int]],
        progress: Progress | None,
        notify: Callable[[int, Notice], None],
        preview: Preview | None = None,
    ) -> tuple[Result, ...]:
        """The pictures, those of a group together."""
        prepared = [prepare(self.networks, self.manifest, one) for one in asked]
        said = [(*one.notices, *more) for one, more in zip(prepared, self._costs(asked, groups), strict=True)]
        for index, notices in enumerate(said):
            for notice in notices:
                notify(index, notice)
        results: dict[int, Result] = {}
        total, before = sum(len(one.sampler.timesteps) for one in asked), 0
        for members in groups:
            unet = self.networks.open_unet(asked[members[0]].entry)
            starts = [prepared[index].start for index in members]
            cached = next((start.entry for start in starts if start.cache is not None), None)
            shallow = None if cached is None else self.networks.open_shallow(cached)
            steps = None if progress is None else partial(_told, progress, before, len(members), total)
            watch = None if preview is None else self._watch(preview, members)
            finals = denoise(unet, self.manifest, starts, steps, watch, shallow)
            before += len(members) * len(asked[members[0]].sampler.timesteps)
            for index, final in zip(members, finals, strict=True):
                with called(asked[index].place):
                    results[index] = self._finish(asked[index].request, prepared[index], final, said[index])
        return tuple(results[index] for index in range(len(asked)))

    def _watch(self, preview: Preview, members: Sequence[int]) -> Watch:
        """What tells ``preview`` of the pictures ``members``, which are denoised together."""

        def watch(position: int, step: int, estimate: Callable[[], Array]) -> None:
            preview(members[position], step, lambda: self.networks.decode_picture(estimate()))

        return watch

    def _costs(self, asked: Sequence[Asked], groups: Sequence[Sequence[int]]) -> list[tuple[Notice, ...]]:
        """Of each request, what there is to say of its UNet calls."""
        shared, said = self.networks.shared, list[tuple[Notice, ...]]([()] * len(asked))
        for members in groups:
            batch = batch_of(self.networks.open_unet(asked[members[0]].entry))
            spare = guidance.batch_notice(sum(asked[index].samples for index in members), batch, shared=shared)
            for index in members:
                own = (spare, alone_notice(asked, index, shared=shared))
                said[index] = tuple(notice for notice in own if notice is not None)
        return said

    def _finish(self, request: Request, prepared: Prepared, final: Array, notices: tuple[Notice, ...]) -> Result:
        """The final latent as a picture."""
        picture, condition = self.networks.decode_picture(final), prepared.condition
        if request.paste_unmasked and condition.mask is not None and condition.picture is not None:
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


def _told(progress: Progress, before: int, pictures: int, total: int, step: int, steps: int) -> None:
    """``progress``, of a step that ``pictures`` make together."""
    progress(before + step * pictures, total)


def _unheard(*said: object) -> None:
    """What nobody asked to be told."""
