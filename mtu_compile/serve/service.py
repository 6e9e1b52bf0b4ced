"""What the endpoints stand on: the bundle, the queue, the worker, and how a wish becomes an order."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from mtu_compile.bundle import Manifest
from mtu_compile.core.errors import MtuError
from mtu_compile.core.tasks import Task
from mtu_compile.runtime import Request, Runtime
from mtu_compile.runtime.prepare import Asked, ask
from mtu_compile.serve import pictures
from mtu_compile.serve.errors import ApiError, from_mtu
from mtu_compile.serve.job import Job, Order
from mtu_compile.serve.metrics import Metrics
from mtu_compile.serve.settings import Settings
from mtu_compile.serve.waiting import Waiting
from mtu_compile.serve.wishes import PictureWish, Wish
from mtu_compile.serve.worker import Worker

#: Random seeds; small enough for every client's numbers.
_SEEDS = 2**32


@dataclass(frozen=True)
class Uploads:
    """Files of a request, as they came."""

    image: bytes | None = None
    mask: bytes | None = None


class Service:
    """One bundle being served.

    Attributes:
        id: what the bundle is called as a model.
        pool: the one thread that decodes and encodes pictures, so that one is in memory at a time.
    """

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self.settings, self.manifest = settings, runtime.manifest
        self.tasks = {task.name: task for task in runtime.tasks}
        shared = runtime.networks.shared
        self.waiting = Waiting(settings.queue, settings.samples, 2 * settings.pixels, shared=shared)
        self.metrics = Metrics(self.waiting)
        self.worker = Worker(runtime, self.waiting, self.metrics, most_samples=settings.samples)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="pictures")
        self.id = model_id(self.manifest)
        self.created = int(time.time())

    @property
    def size(self) -> str:
        """Of all pictures, as OpenAI writes it."""
        height, width = self.manifest.image_size
        return f"{width}x{height}"

    def task_of(self, model: str | None, fitting: list[str], what: str) -> str:
        """The task a ``model`` names among the ``fitting`` ones; the first of them if it names the bundle, or nothing.

        Raises:
            ApiError: 404 for a model that is not here; 400 if no task of the bundle fits.
        """
        name, _, task = (model or self.id).partition(":")
        if name != self.id or (task and task not in self.tasks):
            raise ApiError(404, f"there is no model {(model or '')[:80]!r}; GET /v1/models", "model_not_found", "model")
        if task and task not in fitting:
            raise ApiError(400, f"the task {task!r} is not for {what}; POST /v1/tasks/{task}", "wrong_task", "model")
        if not fitting:
            raise ApiError(400, f"this bundle has no task for {what}; it has {', '.join(self.tasks)}", "no_such_task")
        return task or fitting[0]

    async def admit(self, task: str, wish: Wish, uploads: Uploads) -> Job:
        """Hold a wish against the operator's limits and the bundle, and let it wait for its turn, or ``ApiError``."""
        self._check_limits(task, wish)
        loop = asyncio.get_running_loop()
        pixels = 0
        for raw, what in ((uploads.image, "picture"), (uploads.mask, "mask")):
            if raw is not None:
                try:
                    pixels += await loop.run_in_executor(self.pool, _pixels, raw, what, self.settings.pixels)
                except MtuError as error:
                    raise from_mtu(error, "image" if what == "picture" else "mask") from error
        order = self._order(task, wish, uploads, pixels)
        job = Job(order, time.monotonic() + self.settings.timeout, loop)
        self.waiting.put(job)
        return job

    def _check_limits(self, task: str, wish: Wish) -> None:
        settings = self.settings
        if task not in self.tasks:
            raise ApiError(404, f"there is no task {task[:80]!r}; it has {', '.join(self.tasks)}", "no_such_task")
        if wish.n > settings.pictures:
            raise ApiError(400, f"n: at most {settings.pictures} pictures", "invalid_value", "n")
        if (wish.num_inference_steps or 0) > settings.steps:
            message = f"num_inference_steps: at most {settings.steps}"
            raise ApiError(400, message, "invalid_value", "num_inference_steps")
        for name in ("prompt", "negative_prompt"):
            if len(getattr(wish, name) or "") > settings.prompt_chars:
                raise ApiError(400, f"{name}: at most {settings.prompt_chars} characters", "invalid_value", name)
        if wish.size not in (None, "auto", self.size):
            message = f"size: this model makes pictures of {self.size}, and nothing else"
            raise ApiError(400, message, "invalid_value", "size")

    def _order(self, task: str, wish: Wish, uploads: Uploads, pixels: int) -> Order:
        seed = secrets.randbelow(_SEEDS) if wish.rng_seed is None else wish.rng_seed
        steps = wish.num_inference_steps
        if steps is None:
            steps = min(self.manifest.tasks[task].default_steps, self.settings.steps)
        asked = [self._ask(task, wish, uploads, seed + index, steps) for index in range(wish.n)]
        return Order(
            requests=[one.request for one in asked],
            timesteps=asked[0].timesteps,
            samples=sum(one.samples for one in asked),
            calls=len(asked[0].timesteps),
            image=uploads.image,
            mask=uploads.mask,
            pixels=pixels,
            most_pixels=self.settings.pixels,
            partial_images=wish.partial_images if wish.stream else 0,
        )

    def _ask(self, task: str, wish: Wish, uploads: Uploads, seed: int, steps: int) -> Asked:
        """The picture of ``seed``, found possible. Its source picture and mask are stand-ins: their bytes are kept."""
        there = Image.new("L", (1, 1))
        picture = wish if isinstance(wish, PictureWish) else PictureWish.model_validate({})
        request = Request(
            task,
            wish.prompt,
            wish.negative_prompt or "",
            image=None if uploads.image is None else there,
            mask=None if uploads.mask is None else there,
            seed=seed,
            steps=steps,
            guidance_scale=wish.guidance_scale,
            image_guidance_scale=wish.image_guidance_scale,
            scheduler=wish.scheduler,
            fit=picture.fit,
            mask_mode=picture.mask_mode,
            paste_unmasked=picture.paste_unmasked,
            original_size=_pair(wish.original_size),
            crops_coords_top_left=_pair(wish.crops_coords_top_left),
            target_size=_pair(wish.target_size),
        )
        try:
            return ask(self.manifest, request)
        except MtuError as error:
            raise from_mtu(error) from error


def _pair(numbers: list[int] | None) -> tuple[int, int] | None:
    return None if numbers is None else (numbers[0], numbers[1])


def _pixels(raw: bytes, what: str, most: int) -> int:
    """Of a picture that can be decoded as a whole."""
    with pictures.decode(raw, what, most) as picture:
        return picture.width * picture.height


def model_id(manifest: Manifest) -> str:
    """What clients call the bundle: its model's name, of letters, digits and ``-._``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", manifest.source.name).strip("-")[:64] or "model"


def makes_from_words(task: Task) -> bool:
    """Whether the task needs a prompt and nothing else: OpenAI's generations."""
    return not task.condition and task.guidance != "none"


def edits(task: Task) -> bool:
    """Whether the task changes a picture of the result's size as a prompt says: OpenAI's edits without a mask."""
    return "image" in task.condition and not inpaints(task) and task.guidance != "none" and task.downscale is None


def inpaints(task: Task) -> bool:
    """Whether the task repaints what a mask selects: OpenAI's edits with a mask."""
    return bool({"mask", "masked_image"} & set(task.condition))
