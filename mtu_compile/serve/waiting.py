"""The bounded queue between the clients and the one worker."""

from __future__ import annotations

import math
import threading
from collections import deque

from mtu_compile.serve.errors import busy, cancelled, closing
from mtu_compile.serve.job import Job


class Waiting:
    """Jobs in the order they came, of which those that can share UNet calls are handed out together.

    A place is taken before a request's body is read and given back when its answer is sent, so that what clients make
    the server hold is bounded by places times the largest request.

    Args:
        places: requests at a time.
        samples: UNet samples that are handed out together at most; a single job may have more.
        pixels: of the pictures that are handed out together at most; likewise.
        shared: whether the tasks share one UNet. If not, each job is handed out by itself.
    """

    def __init__(self, places: int, samples: int, pixels: int, *, shared: bool) -> None:
        self.places = places
        self.taken = 0
        self._samples, self._pixels, self._shared = samples, pixels, shared
        self._jobs: deque[Job] = deque()
        self._known: dict[str, Job] = {}
        self._changed = threading.Condition()
        self._closing = self._ended = False
        self._seconds = 1.0

    def take_place(self) -> None:
        """A place for one request; ``ApiError`` (429) if there is none, 503 if the server is shutting down."""
        with self._changed:
            if self._closing:
                raise closing()
            if self.taken >= self.places:
                raise busy(self._wait())
            self.taken += 1

    def leave_place(self) -> None:
        with self._changed:
            self.taken -= 1

    def put(self, job: Job) -> None:
        """Let ``job`` wait for its turn."""
        with self._changed:
            if self._ended:
                raise closing()
            self._jobs.append(job)
            self._known[job.id] = job
            self._changed.notify()

    def forget(self, job: Job) -> None:
        """Its client has its answer, or is gone."""
        with self._changed:
            self._known.pop(job.id, None)
            if job.over and job in self._jobs:
                self._jobs.remove(job)

    @property
    def jobs(self) -> list[Job]:
        """All that are waiting or running, oldest first."""
        with self._changed:
            return list(self._known.values())

    @property
    def depth(self) -> int:
        """Jobs whose turn has not come."""
        with self._changed:
            return len(self._jobs)

    def position(self, job: Job) -> int:
        """Jobs whose turn comes before that of ``job``."""
        with self._changed:
            return next((index for index, one in enumerate(self._jobs) if one is job), 0)

    def cancel(self, identity: str) -> bool:
        """Give up the job of that id; ``False`` if there is none, or it is over."""
        with self._changed:
            job = self._known.get(identity)
        return job is not None and job.cancel(cancelled())

    def next(self) -> list[Job] | None:
        """The jobs whose turn it is, as soon as there are any; ``None`` when the server has ended. For the worker."""
        with self._changed:
            while True:
                while self._jobs and self._jobs[0].over:
                    self._jobs.popleft()
                if self._jobs:
                    return self._group()
                if self._ended:
                    return None
                self._changed.wait()

    def took(self, seconds: float, jobs: int) -> None:
        """The worker's last jobs took so long: what clients that are refused are told to wait goes by it."""
        with self._changed:
            self._seconds += 0.2 * (seconds / jobs - self._seconds)

    def begin_closing(self) -> None:
        """Take no further requests; those that are there go on."""
        with self._changed:
            self._closing = True

    @property
    def closing(self) -> bool:
        return self._closing

    def end(self) -> None:
        """Give up what is still there, and let the worker end."""
        for job in self.jobs:
            job.cancel(closing())
        with self._changed:
            self._closing = self._ended = True
            self._changed.notify_all()

    def _wait(self) -> int:
        """Seconds until a place is free, roughly: a quarter of what stands in line."""
        return max(1, min(120, math.ceil(self._seconds * (len(self._jobs) + 1) / 4)))

    def _group(self) -> list[Job]:
        first = self._jobs.popleft()
        group, samples, pixels = [first], first.order.samples, first.order.pixels
        if not self._shared:
            return group
        for job in list(self._jobs):
            samples_then, pixels_then = samples + job.order.samples, pixels + job.order.pixels
            same = job.order.timesteps == first.order.timesteps and not job.over
            if same and samples_then <= self._samples and pixels_then <= self._pixels:
                self._jobs.remove(job)
                group.append(job)
                samples, pixels = samples_then, pixels_then
        return group
