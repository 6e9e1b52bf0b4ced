"""What a client gets back: one JSON object, or server-sent events under OpenAI's names."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Literal

from PIL import Image
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from mtu_compile.runtime import Result
from mtu_compile.serve import pictures
from mtu_compile.serve.errors import ApiError, cancelled, timed_out
from mtu_compile.serve.job import Began, Event, Failed, Finished, Job, Sketched, Stepped
from mtu_compile.serve.service import Service
from mtu_compile.serve.wishes import Wish

#: What events are called: OpenAI's two endpoints, and ours, which tells of progress, too.
Family = Literal["image_generation", "image_edit", "task"]

#: Seconds between two signs of life of a stream in which nothing happens; proxies close silent ones after 60 or so.
_BEAT = 10.0

#: Clients read it; nothing is counted, as nothing is billed.
_USAGE = {
    "input_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
    "output_tokens": 0,
    "total_tokens": 0,
}


async def answer(
    service: Service, request: HttpRequest, job: Job, wish: Wish, family: Family, done: Callable[[], None]
) -> Response:
    """The response to ``job``; ``done`` is called when it was sent, or its client has gone."""
    headers = {"X-Request-Id": job.id}
    if wish.stream:
        events = _stream(service, job, wish, family, done)
        headers |= {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
        return _Events(events, headers, done)
    try:
        return await _whole(service, request, job, wish, headers)
    finally:
        done()


async def _whole(service: Service, request: HttpRequest, job: Job, wish: Wish, headers: dict[str, str]) -> Response:
    """Wait for the pictures, or for the client to go."""
    outcome, gone = asyncio.ensure_future(_outcome(service, job)), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({outcome, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not outcome.done():
            return Response(status_code=499)  # nginx's number for it; nobody reads it
        event = outcome.result()
        if isinstance(event, Failed):
            raise event.error
        return JSONResponse(await _body(service, wish, job, event.results), headers=headers)
    finally:
        job.cancel(cancelled())
        outcome.cancel()
        gone.cancel()


async def _outcome(service: Service, job: Job) -> Finished | Failed:
    async for event in job.events(timed_out(service.settings.timeout), _BEAT):
        if isinstance(event, (Finished, Failed)):
            return event
    raise AssertionError("a job's events end with its outcome")


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    service: Service, job: Job, wish: Wish, family: Family, done: Callable[[], None]
) -> AsyncGenerator[bytes, None]:
    try:
        if family == "task":
            yield _event("task.queued", {"id": job.id, "position": service.waiting.position(job)})
        async for event in job.events(timed_out(service.settings.timeout), _BEAT):
            if event is None:
                yield b": still here\n\n"
            else:
                async for piece in _pieces(service, job, wish, family, event):
                    yield piece
    except ApiError as error:
        yield _failure(error)
    finally:
        job.cancel(cancelled())
        done()


async def _pieces(service: Service, job: Job, wish: Wish, family: Family, event: Event) -> AsyncIterator[bytes]:
    ours = family == "task"
    if isinstance(event, Began) and ours:
        yield _event("task.started", {"id": job.id, "together_with": event.others})
    elif isinstance(event, Stepped) and ours:
        yield _event("task.progress", {"id": job.id, "done": event.done, "total": event.total})
    elif isinstance(event, Sketched):
        index = {"image_index": event.index} if len(job.order.requests) > 1 or ours else {}
        picture = await _picture(service, wish, event.image)
        yield _event(f"{family}.partial_image", {**picture, "partial_image_index": event.number, **index})
    elif isinstance(event, Failed):
        yield _failure(event.error)
    elif isinstance(event, Finished):
        for result, asked in zip(event.results, job.order.requests, strict=True):
            picture = await _picture(service, wish, result.image)
            yield _event(f"{family}.completed", {**picture, "usage": _USAGE, "seed": asked.seed, **_said(result)})


async def _body(service: Service, wish: Wish, job: Job, results: Any) -> dict[str, Any]:
    data = []
    for result, asked in zip(results, job.order.requests, strict=True):
        text = await _encoded(service, wish, result.image)
        data.append({"b64_json": text, "seed": asked.seed, **_said(result)})
    return {
        "created": int(time.time()),
        "data": data,
        "background": "opaque",
        "output_format": wish.output_format,
        "size": service.size,
        "usage": _USAGE,
    }


async def _picture(service: Service, wish: Wish, image: Image.Image) -> dict[str, Any]:
    return {
        "b64_json": await _encoded(service, wish, image),
        "created_at": int(time.time()),
        "size": service.size,
        "quality": "auto",
        "background": "opaque",
        "output_format": wish.output_format,
    }


def _encoded(service: Service, wish: Wish, image: Image.Image) -> Awaitable[str]:
    loop = asyncio.get_running_loop()
    return loop.run_in_executor(service.pool, pictures.encode, image, wish.output_format, wish.output_compression)


def _said(result: Result) -> dict[str, Any]:
    """What may not be as it was meant, and where in the result its source picture is."""
    said: dict[str, Any] = {}
    # that others did not share its calls is nothing to this client
    if notices := [notice.to_json() for notice in result.notices if notice.kind != "batch-alone"]:
        said["notices"] = notices
    if result.frame is not None:
        said["frame"] = {"used": list(result.frame.box), "place": list(result.frame.place)}
    return said


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def _failure(error: ApiError) -> bytes:
    return f"event: error\ndata: {json.dumps({'type': 'error', **error.body()})}\n\n".encode()


class _Events(StreamingResponse):
    """A stream whose end is known even if it was never begun: a client may go before its first event."""

    def __init__(
        self, events: AsyncGenerator[bytes, None], headers: dict[str, str], abandon: Callable[[], None]
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._produced, self._abandon = events, abandon

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._produced.aclose()
            self._abandon()
