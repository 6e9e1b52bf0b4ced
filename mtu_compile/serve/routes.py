"""The endpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mtu_compile.core.tasks import Task
from mtu_compile.core.version import __version__
from mtu_compile.runtime import schedulers
from mtu_compile.serve import pictures
from mtu_compile.serve.answers import Family, answer
from mtu_compile.serve.bodies import Body, read_body
from mtu_compile.serve.errors import ApiError, cancelled
from mtu_compile.serve.metrics import CONTENT_TYPE
from mtu_compile.serve.service import Service, Uploads, edits, inpaints, makes_from_words
from mtu_compile.serve.wishes import PictureWish, TaskWish, Wish, read_wish

_PAGES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    "/docs.js": ("docs.js", "text/javascript; charset=utf-8"),
}


def make_router(service: Service) -> APIRouter:
    """All endpoints of ``service``."""
    router = APIRouter()
    _add_pages(router)
    _add_health(router, service)
    _add_models(router, service)
    _add_jobs(router, service)
    _add_images(router, service)
    return router


def _add_images(router: APIRouter, service: Service) -> None:
    settings = service.settings

    async def make(request: Request, kind: type[Wish], family: Family, task: str | None, **taken: bool) -> Response:
        service.waiting.take_place()
        place = _Place(service.waiting.leave_place)
        try:
            body = await read_body(request, settings, **taken)
            wish = read_wish(kind, _without_pictures(body), is_form=body.is_form)
            uploads = _uploads(body)
            job = await service.admit(task or _task_for(service, family, wish, uploads), wish, uploads)
        except BaseException:
            place.leave()
            raise

        def done() -> None:
            job.cancel(cancelled())
            if place.leave():
                service.waiting.forget(job)
                service.metrics.concluded(job)

        return await answer(service, request, job, wish, family, done)

    @router.post("/v1/images/generations", tags=["images"], openapi_extra=_takes(json=Wish))
    async def generate(request: Request) -> Response:
        """Make pictures from words: OpenAI's `images.generate`."""
        return await make(request, Wish, "image_generation", None, form=False)

    @router.post("/v1/images/edits", tags=["images"], openapi_extra=_takes(form=PictureWish))
    async def edit(request: Request) -> Response:
        """Change a picture, all of it or where a mask is transparent: OpenAI's `images.edit`."""
        return await make(request, PictureWish, "image_edit", None, json=False)

    @router.post("/v1/tasks/{task}", tags=["tasks"], openapi_extra=_takes(json=TaskWish, form=TaskWish))
    async def run_task(request: Request, task: str) -> Response:
        """Run any task of the bundle. With `stream`, its events tell of queue and progress, too."""
        return await make(request, TaskWish, "task", task)


class _Place:
    """A place in the queue, which is given back once."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back, self._left = give_back, False

    def leave(self) -> bool:
        """Whether it was still taken."""
        if self._left:
            return False
        self._left = True
        self._give_back()
        return True


def _without_pictures(body: Body) -> dict[str, Any]:
    """The fields but for pictures in base64, which need no checks of text."""
    return {name: value for name, value in body.values.items() if body.is_form or name not in ("image", "mask")}


def _uploads(body: Body) -> Uploads:
    """The pictures of a body; ``ApiError`` (400) if there are other files, several of one, or something else."""
    found: dict[str, bytes] = {}
    if body.is_form:
        for name, contents in body.files.items():
            if name not in ("image", "mask"):
                raise ApiError(400, f"unknown file {name[:80]!r}", "unknown_parameter", name[:80])
            if len(contents) > 1:
                raise ApiError(400, f"{name}: one picture, not {len(contents)}", "invalid_value", name)
            found[name] = contents[0]
        for name in ("image", "mask"):
            if body.values.get(name) is not None:
                raise ApiError(400, f"{name} is no file", "invalid_value", name)
    else:
        for name in ("image", "mask"):
            text = body.values.get(name)
            if text is None:
                continue
            if not isinstance(text, str):
                raise ApiError(400, f"{name} is no text", "invalid_value", name)
            found[name] = pictures.from_text(text, name)
    return Uploads(**found)


def _task_for(service: Service, family: Family, wish: Wish, uploads: Uploads) -> str:
    """The task of one of OpenAI's endpoints."""
    if family == "image_generation":
        fits, what = makes_from_words, "making pictures from words alone"
    elif uploads.mask is not None:
        fits, what = inpaints, "editing with a mask"
    else:
        fits, what = edits, "editing without a mask"
    return service.task_of(wish.model, [name for name, task in service.tasks.items() if fits(task)], what)


def _add_models(router: APIRouter, service: Service) -> None:
    def model(task: str | None = None) -> dict[str, Any]:
        name = service.id if task is None else f"{service.id}:{task}"
        tasks = list(service.tasks) if task is None else [task]
        return {"id": name, "object": "model", "created": service.created, "owned_by": "mtu-compile", "tasks": tasks}

    @router.get("/v1/models", tags=["models"])
    async def list_models() -> JSONResponse:
        """The bundle, and each of its tasks."""
        return JSONResponse({"object": "list", "data": [model(), *map(model, service.tasks)]})

    @router.get("/v1/models/{name}", tags=["models"])
    async def get_model(name: str) -> JSONResponse:
        """One of them."""
        bundle, _, task = name.partition(":")
        if bundle != service.id or (task and task not in service.tasks) or name.endswith(":"):
            raise ApiError(404, f"there is no model {name[:80]!r}", "model_not_found", "model")
        return JSONResponse(model(task or None))

    @router.get("/v1/tasks", tags=["tasks"])
    async def list_tasks() -> JSONResponse:
        """What the bundle can do, and what this server allows."""
        settings, manifest = service.settings, service.manifest
        limits = {
            "n": settings.pictures,
            "num_inference_steps": settings.steps,
            "prompt_characters": settings.prompt_chars,
            "upload_bytes": settings.upload_bytes,
            "picture_pixels": settings.pixels,
            "queue": settings.queue,
        }
        return JSONResponse(
            {
                "model": service.id,
                "target": manifest.target,
                "precision": manifest.precision,
                "routing": manifest.routing,
                "size": service.size,
                "tasks": [_describe(task, manifest.tasks[name].default_steps) for name, task in service.tasks.items()],
                "schedulers": list(schedulers.NAMES),
                "limits": limits,
            }
        )


def _describe(task: Task, steps: int) -> dict[str, Any]:
    return {
        "name": task.name,
        "needs": {
            "prompt": task.guidance != "none",
            "image": bool({"image", "masked_image"} & set(task.condition)),
            "mask": inpaints(task),
        },
        "guidance": task.guidance,
        "guidance_scale": task.guidance_scale,
        "image_guidance_scale": task.image_guidance_scale,
        "downscale": task.downscale,
        "num_inference_steps": steps,
    }


def _add_jobs(router: APIRouter, service: Service) -> None:
    @router.get("/v1/jobs", tags=["jobs"])
    async def list_jobs() -> JSONResponse:
        """Requests that are waiting or being worked on, oldest first."""
        data = [
            {
                "id": job.id,
                "task": job.order.task,
                "state": job.state,
                "created": int(job.created),
                "done": job.done,
                "total": job.total,
            }
            for job in service.waiting.jobs
        ]
        return JSONResponse({"object": "list", "data": data})

    @router.delete("/v1/jobs/{identity}", tags=["jobs"])
    async def cancel_job(identity: str) -> JSONResponse:
        """Cancel a request, by the id in its `X-Request-Id` header and its first event."""
        if not service.waiting.cancel(identity):
            raise ApiError(404, f"there is no request {identity[:40]!r} to cancel", "no_such_job")
        return JSONResponse({"id": identity, "cancelled": True})


def _add_health(router: APIRouter, service: Service) -> None:
    worker, waiting = service.worker, service.waiting

    @router.get("/healthz/live", tags=["health"])
    async def live() -> JSONResponse:
        """Whether the process works: 503 is a reason to restart it."""
        return JSONResponse({"live": worker.alive}, 200 if worker.alive else 503)

    @router.get("/healthz/ready", tags=["health"])
    async def ready() -> JSONResponse:
        """Whether it takes requests: engines open, and not shutting down."""
        yes = worker.alive and worker.ready and not waiting.closing
        return JSONResponse({"ready": yes}, 200 if yes else 503)

    @router.get("/healthz", tags=["health"])
    async def health() -> JSONResponse:
        """Both."""
        yes = worker.alive and worker.ready and not waiting.closing
        return JSONResponse({"live": worker.alive, "ready": yes, "version": __version__}, 200 if yes else 503)

    @router.get("/metrics", tags=["health"])
    async def metrics() -> Response:
        """What Prometheus reads; with the token, like all else."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_pages(router: APIRouter) -> None:
    def add(path: str, name: str, kind: str) -> None:
        @router.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(_page(name), media_type=kind, headers={"Cache-Control": "no-cache"})

    for path, (name, kind) in _PAGES.items():
        add(path, name, kind)

    @router.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)


@lru_cache(maxsize=16)
def _page(name: str) -> bytes:
    return (files("mtu_compile.serve") / "page" / name).read_bytes()


def _takes(json: type[Wish] | None = None, form: type[Wish] | None = None) -> dict[str, Any]:
    """What an endpoint reads by itself, for the OpenAPI page."""
    content: dict[str, Any] = {}
    if json is not None:
        content["application/json"] = {"schema": json.model_json_schema()}
    if form is not None:
        schema = form.model_json_schema()
        file = {"type": "string", "format": "binary"}
        fields = {**schema["properties"], "image": file, "mask": file}
        content["multipart/form-data"] = {"schema": {**schema, "properties": fields}}
    answer = {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The pictures."}
    return {"requestBody": {"required": True, "content": content}, "responses": {"200": answer}}
