"""The queue as clients meet it: full, cancelled, gone, late, shared, shut down."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any

import httpx
import openai
import pytest

from tests.serve.conftest import HOLE, LIMIT, MASK, SOURCE, Running, png
from tests.waiting import until

Start = Callable[..., Running]
WISH = {"prompt": "a cat", "num_inference_steps": 5, "rng_seed": 1}


def b64(picture: Any) -> str:
    return base64.b64encode(png(picture)).decode()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


@contextmanager
def held(server: Running, pool: ThreadPoolExecutor) -> Iterator[Future[httpx.Response]]:
    """A request whose first UNet call is held until the block ends."""
    server.gate.shut()
    future = pool.submit(server.http.post, "/v1/tasks/t2i", json=WISH)
    assert server.gate.reached.wait(LIMIT)
    try:
        yield future
    finally:
        server.gate.open.set()


def events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start(queue=2)
    with held(server, pool) as first:
        second = pool.submit(server.http.post, "/v1/tasks/t2i", json=WISH)
        until(lambda: server.service.waiting.depth == 1)
        refused = server.http.post("/v1/tasks/t2i", json=WISH)
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.token.reveal(), max_retries=0).images.generate(
                prompt="a"
            )
        assert server.http.get("/healthz").status_code == 200  # it is busy, not ill
    assert [one.result(LIMIT).status_code for one in (first, second)] == [200, 200]
    assert server.http.post("/v1/tasks/t2i", json=WISH).status_code == 200
    until(lambda: server.service.waiting.taken == 0)
    assert server.metric('mtu_jobs_total{end="done",task="t2i"}') == 3


def test_tasks_share_the_unets_calls_and_their_pictures_stay_what_they_are(
    start: Start, pool: ThreadPoolExecutor
) -> None:
    server = start()
    wishes: list[tuple[str, dict[str, Any]]] = [
        ("t2i", WISH),
        ("edit", {**WISH, "image": b64(SOURCE)}),
        ("sr", {"num_inference_steps": 5, "rng_seed": 1, "image": b64(SOURCE.resize((8, 8)))}),
        ("inpaint", {**WISH, "image": b64(SOURCE), "mask": b64(MASK)}),
    ]
    alone = [server.http.post(f"/v1/tasks/{task}", json=wish).json()["data"][0]["b64_json"] for task, wish in wishes]
    server.gate.calls.clear()
    with held(server, pool) as first:
        together = [pool.submit(server.http.post, f"/v1/tasks/{task}", json=wish) for task, wish in wishes]
        odd = pool.submit(server.http.post, "/v1/tasks/t2i", json={**WISH, "num_inference_steps": 4})
        until(lambda: server.service.waiting.depth == 5)
    assert first.result(LIMIT).status_code == odd.result(LIMIT).status_code == 200
    answers = [one.result(LIMIT).json()["data"][0]["b64_json"] for one in together]
    # the four take nine samples a step, of which this engine computes three at a time; alone they took 2, 3, 1 and 3
    assert sorted(server.gate.calls) == sorted([2] * 5 + [3] * 3 * 5 + [2] * 4)
    assert (
        server.metric('mtu_requests_together_bucket{le="4.0"}')
        - server.metric('mtu_requests_together_bucket{le="3.0"}')
        == 1
    )
    assert len(set(answers)) == 4
    for one, other in zip(alone, answers, strict=True):
        assert abs(len(base64.b64decode(one)) - len(base64.b64decode(other))) < 100  # float32's rounding, at most


def test_one_bad_request_does_not_spoil_what_it_shared_calls_with(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start()
    with held(server, pool):
        good = pool.submit(server.http.post, "/v1/tasks/t2i", json=WISH)
        # found out only when it is prepared: the mask has no transparency
        bad = pool.submit(
            server.http.post,
            "/v1/tasks/inpaint",
            json={**WISH, "image": b64(SOURCE), "mask": b64(MASK), "mask_mode": "alpha"},
        )
        until(lambda: server.service.waiting.depth == 2)
    assert good.result(LIMIT).status_code == 200
    assert bad.result(LIMIT).status_code == 400 and "transparency" in bad.result().json()["error"]["message"]


def test_delete_cancels_what_waits_and_what_runs(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start()
    with held(server, pool) as running:
        waiting = pool.submit(server.http.post, "/v1/tasks/t2i", json=WISH)
        until(lambda: server.service.waiting.depth == 1)
        jobs = server.http.get("/v1/jobs").json()["data"]
        assert [job["state"] for job in jobs] == ["running", "waiting"]
        for job in jobs:
            assert server.http.delete(f"/v1/jobs/{job['id']}").json() == {"id": job["id"], "cancelled": True}
        for one in (running, waiting):
            assert one.result(LIMIT).status_code == 409 and one.result().json()["error"]["code"] == "cancelled"
        assert server.http.delete(f"/v1/jobs/{jobs[0]['id']}").status_code == 404
    assert server.http.post("/v1/tasks/t2i", json=WISH).status_code == 200
    assert server.gate.calls == [2] * 6  # one of the cancelled request's five, none of the other's


def test_a_stream_tells_of_queue_and_progress_and_ends_when_cancelled(start: Start) -> None:
    server = start()
    with server.http.stream("POST", "/v1/tasks/t2i", json={**WISH, "stream": True, "partial_images": 1}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        told = list(events(response))
    steps = [(one["done"], one["total"]) for one in told if one["type"] == "task.progress"]
    assert steps == [(step, 5) for step in range(1, 6)]
    others = [one["type"] for one in told if one["type"] != "task.progress"]
    assert others == ["task.queued", "task.started", "task.partial_image", "task.completed"]
    assert told[0]["id"] == response.headers["X-Request-Id"]
    server.gate.shut()
    with server.http.stream("POST", "/v1/tasks/t2i", json={**WISH, "stream": True}) as response:
        told = []
        for event in events(response):
            told.append(event)
            if event["type"] == "task.queued":
                assert server.gate.reached.wait(LIMIT)
                server.http.delete(f"/v1/jobs/{event['id']}")
    assert (told[-1]["type"], told[-1]["error"]["code"]) == ("error", "cancelled")


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_stops_for_a_client_that_is_gone(start: Start, stream: bool) -> None:
    server = start()
    server.gate.shut()
    wish = {**WISH, "num_inference_steps": 60, "stream": stream}
    if stream:
        with server.http.stream("POST", "/v1/tasks/t2i", json=wish) as response:
            told = events(response)  # kept: what closes it hangs up, perhaps before the engine is reached
            next(told)
            assert server.gate.reached.wait(LIMIT)
    else:
        authorization = {"Authorization": server.http.headers["Authorization"], "Content-Type": "application/json"}
        with closing(HTTPConnection("127.0.0.1", server.port, timeout=LIMIT)) as connection:
            connection.request("POST", "/v1/tasks/t2i", json.dumps(wish), authorization)
            assert server.gate.reached.wait(LIMIT)
    until(lambda: server.service.waiting.taken == 0)
    server.gate.open.set()
    assert server.http.post("/v1/tasks/t2i", json=WISH).status_code == 200
    assert server.gate.calls == [2] * (1 + 5)  # the call that was held, and the next client's
    assert server.metric('mtu_jobs_total{end="cancelled",task="t2i"}') == 1


def test_a_batch_goes_on_as_long_as_somebody_waits_for_it(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start()
    with held(server, pool):
        both = [pool.submit(server.http.post, "/v1/tasks/t2i", json=WISH) for _ in range(2)]
        until(lambda: server.service.waiting.depth == 2)
    server.gate.shut()
    server.gate.reached.wait(LIMIT)
    running = [job for job in server.service.waiting.jobs if job.state == "running"]
    server.http.delete(f"/v1/jobs/{running[-1].id}")
    server.gate.open.set()
    assert 200 in [one.result(LIMIT).status_code for one in both]


def test_an_answer_that_takes_too_long_is_given_up(start: Start) -> None:
    server = start(timeout=1.0)
    server.gate.shut()
    late = server.http.post("/v1/tasks/t2i", json=WISH)
    server.gate.open.set()
    assert late.status_code == 504
    assert late.json()["error"] == {
        "message": "there was no answer within 1 seconds",
        "type": "server_error",
        "param": None,
        "code": "timeout",
    }
    until(lambda: server.service.waiting.taken == 0)


def test_at_the_end_what_was_admitted_is_answered_and_nothing_else(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start()
    with held(server, pool) as running:
        waiting = pool.submit(server.http.post, "/v1/tasks/t2i", json=WISH)
        until(lambda: server.service.waiting.depth == 1)
        server.service.waiting.begin_closing()
        assert server.http.get("/healthz/ready").status_code == 503
        assert server.http.get("/healthz/live").status_code == 200
        assert server.http.post("/v1/tasks/t2i", json=WISH).status_code == 503
        server.server.stop()
    assert [one.result(LIMIT).status_code for one in (running, waiting)] == [200, 200]
    server.thread.join(LIMIT)
    assert not server.thread.is_alive()
    with pytest.raises(httpx.ConnectError):
        server.http.get("/healthz")


def test_what_is_not_done_when_the_grace_ends_is_told_so(start: Start, pool: ThreadPoolExecutor) -> None:
    server = start(grace=0.5)
    with held(server, pool) as running:
        server.server.stop()
        assert running.result(LIMIT).status_code == 503
        assert running.result().json()["error"]["code"] == "shutting_down"


def test_an_openai_mask_and_a_white_one_are_the_same_at_a_tasks_own_endpoint(start: Start) -> None:
    server = start()
    answers = [
        server.http.post("/v1/tasks/inpaint", json={**WISH, "image": b64(SOURCE), "mask": mask}).json()["data"][0]
        for mask in (b64(MASK), "data:image/png;base64," + b64(HOLE))
    ]
    assert answers[0]["b64_json"] == answers[1]["b64_json"]
