"""From settings to a server that runs until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mtu_compile import runtime
from mtu_compile.bundle import keys
from mtu_compile.core.errors import ConfigError, MtuError, TargetError
from mtu_compile.serve import follow
from mtu_compile.serve.app import make_app
from mtu_compile.serve.service import Service
from mtu_compile.serve.settings import Settings
from mtu_compile.serve.token import Token, kept_token, new_token

#: Seconds for a request's head, which is small: whoever sends it letter by letter only holds a connection.
_HEAD_SECONDS = 10.0
#: Connections at a time, beyond which uvicorn answers 503 by itself: below the 1,024 open files of most systems.
_CONNECTIONS = 512
_HEAD_BYTES = 32 * 1024

#: Seconds for the request of who was accepted a moment before nobody is any more: a connection without one is closed.
_SETTLE = 1.0

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(settings: Settings, say: Callable[[str], None], note: Callable[[str], None]) -> None:
    """Serve ``settings.bundle`` until SIGINT or SIGTERM.

    Args:
        settings: the operator's.
        say: told the address, with the token unless that is kept in a file.
        note: told what is worth knowing.

    Raises:
        ConfigError: impossible settings; the port is taken.
        BundleError: the bundle is damaged, or signed by none of the trusted keys.
        MtuError: an engine cannot be opened or run.
    """
    settings.check()
    link = follow.Link(settings.bundle) if settings.follow else None
    token = new_token() if settings.token_file is None else kept_token(settings.token_file)
    secure = settings.tls_cert is not None
    fd = settings.fd
    with (
        listen(settings.host, settings.port) if fd is None else follow.inherited(fd) as listening,
        listening.dup() as kept,
    ):
        loaded = _load(settings, settings.bundle if link is None else link.target)
        service = Service(loaded, settings)
        if not secure and not _is_loopback(settings.host):
            note("the token and all pictures cross the network unencrypted: give --tls-cert, or put a proxy before it")
        address = url(settings.host, listening.getsockname()[1], secure=secure)
        page = f"{address}/#token={token.reveal()}" if settings.token_file is None else f"{address}/"
        server = make_server(service, token, lambda: say(page), link)
        run(server, listening)
        if server.handing_over and service.worker.failure is None:
            follow.become_next(settings, kept)
    if service.worker.failure is not None:
        failure = service.worker.failure
        if isinstance(failure, MtuError):
            raise failure
        raise TargetError(f"the engines ended: {type(failure).__name__}: {failure}") from failure


def _load(settings: Settings, bundle: Path) -> runtime.Runtime:
    """The bundle in that folder, once the keys that are trusted, if any are named, have signed it."""
    trusted = keys.read_trusted(settings.trust) if settings.trust else None
    return runtime.load(bundle, trusted=trusted)


def make_server(
    service: Service, token: Token, announce: Callable[[], None], link: follow.Link | None = None
) -> GracefulServer:
    """What answers for ``service``, and calls ``announce`` when it does.

    Args:
        service: a bundle.
        token: what clients have to show.
        announce: called once it answers.
        link: makes way for another version when this is pointed elsewhere.

    Raises:
        ConfigError: the certificate or its key cannot be used.
    """
    settings = service.settings
    config = uvicorn.Config(
        make_app(service, token),
        loop="asyncio",
        http=Impatient,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_graceful_shutdown=int(settings.grace) + 5,
        ssl_certfile=None if settings.tls_cert is None else str(settings.tls_cert),
        ssl_keyfile=None if settings.tls_key is None else str(settings.tls_key),
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the certificate or its key cannot be used: {error}", hint="give PEM files") from error
    return GracefulServer(config, service, announce, link)


def run(server: GracefulServer, listening: socket.socket) -> None:
    """Answer at ``listening``, until the server is told to stop."""
    service = server.service
    service.worker.start(server.stop)
    try:
        server.run(sockets=[listening])
    finally:
        service.waiting.end()
        service.worker.join(service.settings.grace + 5)
        service.pool.shutdown(wait=False, cancel_futures=True)


class GracefulServer(uvicorn.Server):
    """Ends with exit code 0 when it is asked to: what was admitted is answered first, for ``grace`` seconds.

    Attributes:
        service: what it answers for.
        handing_over: it ends because there is another version to be served.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, announce: Callable[[], None], link: follow.Link | None = None
    ) -> None:
        super().__init__(config)
        self._link = link
        self.handing_over = False
        self._announce = announce
        self.service = service
        self._timer: threading.Timer | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()  # not earlier: whoever has read the address may send a signal

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if counter % 10 == 9 and not self.should_exit and self._link is not None and self._link.moved():
            self.hand_over()
        return await super().on_tick(counter)

    def hand_over(self) -> None:
        """Accept nobody new, who will wait for the next version, and end when all that was accepted is answered."""
        self.handing_over = self.should_exit = True
        self.config.timeout_graceful_shutdown = int(self.service.settings.timeout) + 5

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.handing_over:
            for server in self.servers:
                server.close()
            await asyncio.sleep(_SETTLE)
        await super().shutdown(sockets)

    def stop(self) -> None:
        """Take no further requests, and end when the present ones are answered; from any thread."""
        self.handing_over = False
        self.service.waiting.begin_closing()
        if self._timer is None:
            self._timer = threading.Timer(self.service.settings.grace, self.service.waiting.end)
            self._timer.daemon = True
            self._timer.start()
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and not self.handing_over:  # asked twice: at once
            self.service.waiting.end()
            self.force_exit = True
        self.stop()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Unlike the base class, do not raise the signal again at the end: this end was asked for, and it went well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self._timer is not None:
                self._timer.cancel()


class Impatient(H11Protocol):
    """uvicorn's, but for two things.

    It closes connections on which no request's head is complete in time, which uvicorn lets stay for ever. And where a
    body breaks the rules of HTTP half-way, the app's own answer is dropped: uvicorn has answered, and would stumble.
    """

    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        if self.cycle is None or self.cycle.response_complete:
            super().send_400_response(msg)
            return
        if self.cycle.response_started:
            self.transport.close()
        else:
            super().send_400_response(msg)
        self.cycle.disconnected = True
        self.cycle.message_event.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()  # a request is being answered; its body has a limit of its own
        elif self._clock is None and not self.transport.is_closing():
            self._clock = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _unwatch(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _give_up(self) -> None:
        self._clock = None
        self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; ``ConfigError`` if that cannot be."""
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
        listening.listen(512)
    except (OSError, UnicodeError) as error:
        hint = "is another server running there? choose another --port"
        raise ConfigError(f"cannot listen at {host} port {port}: {error}", hint=hint) from error
    return listening


def url(host: str, port: int, *, secure: bool) -> str:
    """How a browser reaches the server."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"{'https' if secure else 'http'}://{name}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
