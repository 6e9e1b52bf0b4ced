"""Who may ask: the outermost layers around the app, before a byte of a request's body is read.

**DNS rebinding.** A page of evil.example whose name is made to lead to 127.0.0.1 asks with ``Host: evil.example``, so
only names that were allowed are answered; addresses as such (127.0.0.1, [::1]) cannot be rebound. **Other sites'
pages** say so in ``Origin``, which has to be the server's own or an allowed one. **The token** is in a header that no
browser sends by itself, so neither could do anything even without these two.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from mtu_compile.serve.errors import ApiError
from mtu_compile.serve.token import Token

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: The same bytes for everyone, with nothing of the bundle in them.
OPEN_PATHS = frozenset(
    (
        *("/", "/page.css", "/page.js", "/favicon.ico", "/docs", "/docs.js", "/openapi.json"),
        *("/healthz", "/healthz/live", "/healthz/ready"),
    )
)

#: Nothing from elsewhere, no inline scripts, in nobody's frame; pictures are shown from memory.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
)


class HostGuard:
    """Answers requests to known hosts, from known origins, and says what browsers may do with the answers."""

    def __init__(self, app: App, hosts: Iterable[str], origins: Iterable[str]) -> None:
        self._app = app
        self._hosts = frozenset(("localhost", *(host.lower().rstrip(".") for host in hosts)))
        self._origins = frozenset(origin.lower() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                names = {name.lower() for name, _ in headers}
                extra = [*_HEADERS, (b"cache-control", b"no-store")]
                message = {**message, "headers": [*headers, *(one for one in extra if one[0] not in names)]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_guarded)
        else:
            await refuse(refusal, send_guarded)

    def _refusal(self, scope: Scope) -> ApiError | None:
        hosts = _all(scope, b"host")
        if len(hosts) != 1 or (name := _host_name(hosts[0])) is None:
            return ApiError(400, "the request has no usable Host header", "bad_host")
        if name not in self._hosts and not _is_address(name):
            message = f"this server is not known as {name[:80]!r}; start it with --allow-host if it should be"
            return ApiError(421, message, "bad_host")
        for origin in _all(scope, b"origin"):
            own = f"{scope.get('scheme', 'http')}://{hosts[0].lower()}"
            if origin.lower() != own and origin.lower() not in self._origins:
                return ApiError(403, f"pages of {origin[:80]!r} may not ask this server", "bad_origin")
        return None


class TokenGuard:
    """Answers requests that show the token; a wrong one gets nothing at all, not even what is open to everyone."""

    def __init__(self, app: App, token: Token) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            shown = _all(scope, b"authorization")
            if shown:
                right = len(shown) == 1 and shown[0][:7].lower() == "bearer " and self._token.matches(shown[0][7:])
            else:
                right = scope["path"] in OPEN_PATHS
            if not right:
                what = "the token is wrong" if shown else "a token is needed: Authorization: Bearer TOKEN"
                await refuse(ApiError(401, what, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}), send)
                return
        await self._app(scope, receive, send)


async def refuse(error: ApiError, send: Send) -> None:
    """Answer with ``error`` and nothing else."""
    body = json.dumps(error.body()).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _all(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _host_name(host: str) -> str | None:
    """The name in a ``Host`` header, lower case, without its port; ``None`` if it is no host."""
    if not host or any(letter in host for letter in "/@?#\\ "):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # ValueError if it is no number
        return (parts.hostname or "").rstrip(".") or None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
