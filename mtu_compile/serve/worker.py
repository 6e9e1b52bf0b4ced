"""The one thread that runs the engines: a job at a time, or several of one UNet together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from PIL import Image

from mtu_compile.core.errors import ConfigError, MtuError
from mtu_compile.core.tasks import Task
from mtu_compile.runtime import Request, Result, Runtime
from mtu_compile.serve.errors import ApiError, from_mtu
from mtu_compile.serve.job import Began, Failed, Finished, Job, Sketched, Stepped
from mtu_compile.serve.metrics import Metrics
from mtu_compile.serve.waiting import Waiting

_log = logging.getLogger(__name__)

#: Steps to try an engine with: some samplers need more than one.
_FEW_STEPS = (1, 2, 4, 8)


class _Abandoned(Exception):
    """Nobody waits for any of the pictures that are being made."""


class Worker:
    """Runs what ``waiting`` hands out, in a thread of its own, until that has ended.

    A job whose client is gone is dropped before its turn. Once it shares UNet calls with others it is computed to the
    end, and the calls stop when the last of their clients is gone.

    Attributes:
        ready: every engine is open and has run.
        failure: what kept it from becoming ready, or ended it.
    """

    def __init__(self, runtime: Runtime, waiting: Waiting, metrics: Metrics, *, most_samples: int) -> None:
        self._runtime, self._waiting, self._metrics, self._most = runtime, waiting, metrics, most_samples
        self._thread = threading.Thread(target=self._work, name="engines", daemon=True)
        self.ready = False
        self.failure: BaseException | None = None

    def start(self, on_failure: Callable[[], None]) -> None:
        """Begin; ``on_failure`` is called from the thread if it cannot go on."""
        self._on_failure = on_failure
        self._thread.start()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        return self.failure is None and self._thread.is_alive()

    def _work(self) -> None:
        try:
            self._try_engines()
            self.ready = True
            while (jobs := self._waiting.next()) is not None:
                began = time.monotonic()
                self._metrics.began(jobs)
                self._run(jobs)
                self._waiting.took(time.monotonic() - began, len(jobs))
                self._metrics.ended(time.monotonic() - began)
            self._runtime.close()
        except BaseException as error:
            self.failure = error
            self.ready = False
            _log.exception("the engines' thread ended")
            self._waiting.end()
            self._on_failure()

    def _try_engines(self) -> None:
        """Open every engine and run it once, so that the first client does not wait for that, nor meets its faults."""
        for task in self._runtime.tasks:
            for steps in _FEW_STEPS:
                try:
                    self._runtime.run_batch([trial(task, steps)])
                    break
                except ConfigError:
                    if steps == _FEW_STEPS[-1]:
                        raise

    def _run(self, jobs: Sequence[Job]) -> None:
        opened: list[tuple[Job, list[Request]]] = []
        for job in jobs:
            try:
                opened.append((job, job.order.open()))
                job.tell(Began(len(jobs) - 1))
            except MtuError as error:
                job.tell(Failed(from_mtu(error)))
        if not opened:
            return
        try:
            results = self._make(opened)
        except _Abandoned:
            return
        except MtuError as error:
            if len(opened) == 1:
                self._fail(opened[0][0], error)
            else:  # one of them is to blame, and the others shall not suffer for it
                for job, _ in opened:
                    self._run([job])
            return
        except Exception as error:
            _log.exception("a job failed")
            for job, _ in opened:
                job.tell(Failed(ApiError(500, f"{type(error).__name__} in the engine", "engine_error")))
            return
        start = 0
        for job, requests in opened:
            job.tell(Finished(results[start : start + len(requests)]))
            start += len(requests)

    def _make(self, opened: Sequence[tuple[Job, Sequence[Request]]]) -> tuple[Result, ...]:
        owners = [(job, index) for job, requests in opened for index in range(len(requests))]

        def progress(done: int, total: int) -> None:
            if all(job.abandoned for job, _ in opened):
                raise _Abandoned
            for job, _ in opened:
                job.tell(Stepped(done * job.total // total, job.total))

        def preview(position: int, step: int, make: Callable[[], Image.Image]) -> None:
            job, index = owners[position]
            number = sketch_number(step, job.order.calls, job.order.partial_images)
            if number is None or job.over:
                return
            try:
                job.tell(Sketched(index, number, make()))
            except MtuError:  # what cannot be shown yet; the picture itself will tell if something is wrong
                return

        wanted = any(job.order.partial_images for job, _ in opened)
        return self._runtime.run_batch(
            [request for _, requests in opened for request in requests],
            most_samples=self._most,
            progress=progress,
            preview=preview if wanted else None,
        )

    def _fail(self, job: Job, error: MtuError) -> None:
        failure = from_mtu(error)
        if failure.status >= 500:
            _log.error("%s", error.message)
        job.tell(Failed(failure))


def sketch_number(step: int, calls: int, wanted: int) -> int | None:
    """Which of the ``wanted`` pictures on the way (from 0) is due after ``step`` of ``calls``; ``None`` if none is."""
    due = [round((number + 1) * calls / (wanted + 1)) for number in range(wanted)]
    return due.index(step) if step in due and 0 < step < calls else None


def trial(task: Task, steps: int) -> Request:
    """A request that any engine of ``task`` can be tried with."""
    picture = bool({"image", "masked_image"} & set(task.condition))
    mask = bool({"mask", "masked_image"} & set(task.condition))
    return Request(
        task.name,
        "a" if task.guidance != "none" else "",
        image=Image.new("RGB", (64, 64), "grey") if picture else None,
        mask=Image.new("L", (64, 64), 255) if mask else None,
        mask_mode="white",
        steps=steps,
    )
