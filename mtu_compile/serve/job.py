"""One request that was admitted: what is to be made, and what its client is told meanwhile."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from PIL import Image

from mtu_compile.runtime import Request, Result
from mtu_compile.serve import pictures
from mtu_compile.serve.errors import ApiError

State = Literal["waiting", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True)
class Order:
    """What a client asked for, held against the bundle and found possible.

    Attributes:
        requests: of each picture, without its source picture and mask.
        timesteps: what the UNet is told at each call; equal ones can share calls.
        samples: UNet samples of a call for all the pictures.
        calls: UNet calls of a picture.
        image, mask: files, decoded again when their turn comes: waiting, they are small.
        pixels: of both, once decoded.
        most_pixels: of a picture.
        partial_images: pictures on the way, of each picture.
    """

    requests: Sequence[Request]
    timesteps: tuple[float, ...]
    samples: int
    calls: int
    image: bytes | None = None
    mask: bytes | None = None
    pixels: int = 0
    most_pixels: int = 0
    partial_images: int = 0

    @property
    def task(self) -> str:
        return self.requests[0].task

    def open(self) -> list[Request]:
        """The requests with their pictures; ``InputError`` if one cannot be read."""
        image = None if self.image is None else pictures.decode(self.image, "picture", self.most_pixels)
        mask = None if self.mask is None else pictures.decode(self.mask, "mask", self.most_pixels)
        return [replace(request, image=image, mask=mask) for request in self.requests]


@dataclass(frozen=True)
class Began:
    """Its turn has come, together with the pictures of ``others`` further requests."""

    others: int


@dataclass(frozen=True)
class Stepped:
    """``done`` of the ``total`` UNet calls of its pictures are done."""

    done: int
    total: int


@dataclass(frozen=True)
class Sketched:
    """A picture on the way: the ``number``-th (from 0) of the picture ``index``."""

    index: int
    number: int
    image: Image.Image


@dataclass(frozen=True)
class Finished:
    """All its pictures are there."""

    results: Sequence[Result]


@dataclass(frozen=True)
class Failed:
    """It came to nothing."""

    error: ApiError


Event = Began | Stepped | Sketched | Finished | Failed


@dataclass(eq=False)
class Job:
    """An order on its way. Made in the event loop; the worker's thread tells of it.

    Attributes:
        id: what a client cancels it by.
        deadline: by ``time.monotonic()``.
        state: where it is.
        done, total: UNet calls of its pictures.
    """

    order: Order
    deadline: float
    loop: asyncio.AbstractEventLoop
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    created: float = field(default_factory=time.time)
    queued_at: float = field(default_factory=time.monotonic)
    state: State = "waiting"
    done: int = 0
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    @property
    def total(self) -> int:
        return self.order.calls * len(self.order.requests)

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.state == "cancelled"

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def tell(self, event: Event) -> None:
        """Pass an event to whoever serves the client; from any thread. After the last one, nothing is passed."""
        if self.over:
            return
        if isinstance(event, Began):
            self.state = "running"
        elif isinstance(event, Stepped):
            self.done = event.done
        elif isinstance(event, Finished):
            self.state = "done"
        elif isinstance(event, Failed):
            self.state = "cancelled" if event.error.code in ("cancelled", "timeout", "shutting_down") else "failed"
        try:
            self.loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: the server has ended
            return

    def cancel(self, why: ApiError) -> bool:
        """Give it up; ``False`` if it is over already."""
        if self.over:
            return False
        self.tell(Failed(why))
        return True

    async def next_event(self, timeout: float) -> Event | None:
        """The next event; ``None`` if there is none for ``timeout`` seconds."""
        try:
            return await asyncio.wait_for(self._events.get(), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            return None

    async def events(self, timed_out: ApiError, beat: float) -> AsyncIterator[Event | None]:
        """All events up to the last, and ``None`` after each ``beat`` seconds without one.

        At the deadline the job is given up with ``timed_out``.
        """
        while True:
            left = self.deadline - time.monotonic()
            event = await self.next_event(max(0.0, min(left, beat)))
            if event is None and left <= beat:
                self.cancel(timed_out)
                event = await self._events.get()
            yield event
            if isinstance(event, (Finished, Failed)):
                return
