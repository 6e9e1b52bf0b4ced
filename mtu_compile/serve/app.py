"""The app: endpoints, errors in one shape, and the guards around it."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse

from mtu_compile.core.version import __version__
from mtu_compile.serve.errors import ApiError
from mtu_compile.serve.guard import App, HostGuard, Receive, Scope, Send, TokenGuard
from mtu_compile.serve.routes import make_router
from mtu_compile.serve.service import Service
from mtu_compile.serve.token import Token

_log = logging.getLogger(__name__)

_ABOUT = """OpenAI's Images API, and every task of one bundle.
Clients show the token: `Authorization: Bearer TOKEN`. Errors have OpenAI's shape."""


def make_app(service: Service, token: Token) -> App:
    """The whole ASGI app of ``service``."""
    api = FastAPI(title="mtu-compile serve", version=__version__, description=_ABOUT, docs_url=None, redoc_url=None)
    api.include_router(make_router(service))
    _add_errors(api)
    app: App = TokenGuard(_Counted(api, service), token)
    origins = list(service.settings.allow_origin)
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    return HostGuard(app, service.settings.allow_host, origins)


class _Counted:
    """Counts responses by the route's pattern, so that what strangers ask for makes no new series."""

    def __init__(self, app: App, service: Service) -> None:
        self._app, self._metrics = app, service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.responded(route, message["status"])
            await send(message)

        await self._app(scope, receive, counting)


def _add_errors(api: FastAPI) -> None:
    @api.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, dict(error.headers))

    @api.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: f"there is no {request.url.path[:80]!r}", 405: f"{request.method} is not possible here"}
        message = words.get(error.status_code, str(error.detail))
        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, error.headers)

    @api.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, "the server failed; its log says why", "internal_error").body(), 500)
