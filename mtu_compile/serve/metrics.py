"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from mtu_compile.serve.job import Job
from mtu_compile.serve.waiting import Waiting

CONTENT_TYPE = CONTENT_TYPE_LATEST

#: Seconds: from a tiny model on a fast machine to SDXL on a board.
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, waiting: Waiting) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._responses = Counter(
            "mtu_http_responses", "Responses by route and status.", ("route", "status"), registry=self.registry
        )
        self._jobs = Counter("mtu_jobs", "Requests, by task and end.", ("task", "end"), registry=self.registry)
        self._pictures = Counter("mtu_pictures", "Pictures made, by task.", ("task",), registry=self.registry)
        self._waited = Histogram(
            "mtu_wait_seconds", "From a request's arrival to its turn.", registry=self.registry, buckets=_SECONDS
        )
        self._ran = Histogram(
            "mtu_run_seconds", "From a turn to its pictures.", registry=self.registry, buckets=_SECONDS
        )
        self._together = Histogram(
            "mtu_requests_together", "Requests of one turn.", registry=self.registry, buckets=(1, 2, 3, 4, 6, 8, 12)
        )
        depth = Gauge("mtu_waiting", "Requests whose turn has not come.", registry=self.registry)
        depth.set_function(lambda: waiting.depth)
        places = Gauge("mtu_places_taken", "Requests at a time, of --queue.", registry=self.registry)
        places.set_function(lambda: waiting.taken)

    def responded(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()

    def began(self, jobs: Sequence[Job]) -> None:
        self._together.observe(len(jobs))
        for job in jobs:
            self._waited.observe(time.monotonic() - job.queued_at)

    def ended(self, seconds: float) -> None:
        self._ran.observe(seconds)

    def concluded(self, job: Job) -> None:
        """Its client has its answer, or is gone."""
        self._jobs.labels(job.order.task, job.state).inc()
        if job.state == "done":
            self._pictures.labels(job.order.task).inc(len(job.order.requests))

    def text(self) -> bytes:
        return generate_latest(self.registry)
