"""Which jobs are handed out together."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from mtu_compile.runtime import Request
from mtu_compile.serve.errors import ApiError, cancelled
from mtu_compile.serve.job import Job, Order
from mtu_compile.serve.waiting import Waiting
from mtu_compile.serve.worker import sketch_number


def job(samples: int = 2, timesteps: tuple[float, ...] = (9.0, 4.0), pixels: int = 0) -> Job:
    order = Order([Request("t2i", "a")], timesteps, samples, len(timesteps), pixels=pixels)
    return Job(order, time.monotonic() + 60, asyncio.new_event_loop())


def waiting(*jobs: Job, **options: Any) -> Waiting:
    made = Waiting(**{"places": 8, "samples": 6, "pixels": 100, "shared": True, **options})
    for one in jobs:
        made.put(one)
    return made


def test_jobs_of_the_same_timesteps_go_together_and_the_others_keep_their_order() -> None:
    first, other, second, third = job(), job(timesteps=(8.0,)), job(), job()
    queue = waiting(first, other, second, third)
    assert [queue.next(), queue.next()] == [[first, second, third], [other]]


def test_samples_and_pixels_are_limited_but_for_a_single_job() -> None:
    large, small, wide = job(samples=9), job(samples=2), job(samples=3, pixels=80)
    other = job(samples=1, pixels=30)
    queue = waiting(large, small, wide, other)
    assert [queue.next() for _ in range(3)] == [[large], [small, wide], [other]]


def test_an_engine_for_each_task_has_one_job_at_a_time() -> None:
    first, second = job(), job()
    queue = waiting(first, second, shared=False)
    assert [queue.next(), queue.next()] == [[first], [second]]


def test_what_was_cancelled_is_not_handed_out() -> None:
    first, second, third = job(), job(), job()
    queue = waiting(first, second, third)
    first.cancel(cancelled())
    second.cancel(cancelled())
    assert queue.next() == [third]
    queue.end()
    assert queue.next() is None
    with pytest.raises(ApiError):
        queue.put(job())


def test_places_are_counted_and_given_back() -> None:
    queue = waiting(places=1)
    queue.take_place()
    with pytest.raises(ApiError) as refused:
        queue.take_place()
    assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
    queue.leave_place()
    queue.take_place()


def test_clients_are_told_to_wait_longer_when_the_engine_is_slow() -> None:
    queue = waiting(*(job() for _ in range(8)), places=0)
    told = []
    for seconds in (0.01, 100.0):
        for _ in range(50):
            queue.took(seconds, 1)
        with pytest.raises(ApiError) as refused:
            queue.take_place()
        told.append(int(refused.value.headers["Retry-After"]))
    assert told[0] == 1 and told[1] > 20


@pytest.mark.parametrize(("calls", "wanted", "at"), [(12, 3, [3, 6, 9]), (2, 3, [1]), (1, 3, []), (5, 0, [])])
def test_pictures_on_the_way_are_spread_evenly(calls: int, wanted: int, at: list[int]) -> None:
    assert [step for step in range(1, calls + 1) if sketch_number(step, calls, wanted) is not None] == at
