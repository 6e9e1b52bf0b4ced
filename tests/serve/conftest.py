"""A real server on a real port for each test that asks for one, over the runtime tests' tiny bundle of four tasks."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from mtu_compile import runtime
from mtu_compile.bundle import EngineRef
from mtu_compile.runtime.engine import Array, Engine, open_engine
from mtu_compile.serve.server import GracefulServer, listen, make_server, run, url
from mtu_compile.serve.service import Service
from mtu_compile.serve.settings import Settings
from mtu_compile.serve.token import Token, new_token
from tests.runtime.conftest import make_shared, tiny_bundle

__all__ = ["make_shared", "tiny_bundle"]

#: Against a server that hangs, not a measure of any.
LIMIT = 120.0

SOURCE = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")
MASK = Image.new("L", (32, 32))
ImageDraw.Draw(MASK).rectangle((0, 0, 15, 31), fill=255)
#: The source with a hole where ``MASK`` is white, as OpenAI has masks.
HOLE = Image.fromarray(np.dstack([np.asarray(SOURCE), 255 - np.asarray(MASK)]))


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


class Gate:
    """Opens a bundle's networks, counts the UNet's samples of each call, and holds calls while it is shut."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls, self.open, self.reached = root, list[int](), threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, ref: EngineRef) -> Engine:
        engine = open_engine(ref.kind, self.root / ref.path, ref.config)
        return _Gated(engine, self) if ref.path.startswith("unet") else engine

    def shut(self) -> None:
        """Hold the next call; ``reached`` tells when it has come."""
        self.reached.clear()
        self.open.clear()


class _Gated:
    def __init__(self, engine: Engine, gate: Gate) -> None:
        self.engine, self.gate = engine, gate
        self.inputs, self.outputs, self.close = engine.inputs, engine.outputs, engine.close

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.gate.reached.set()
        assert self.gate.open.wait(LIMIT)
        self.gate.calls.append(len(inputs["sample"]))
        return self.engine(inputs)


class Running:
    """A server in a thread.

    Attributes:
        http: a client that shows the token.
        gate: what the UNet's calls pass.
    """

    def __init__(self, settings: Settings) -> None:
        self.gate = Gate(settings.bundle)
        self.token: Token = new_token()
        self.service = Service(runtime.load(settings.bundle, opener=self.gate, warn=False), settings)
        self.server: GracefulServer = make_server(self.service, self.token, lambda: None)
        self._listening = listen(settings.host, 0)
        self.port: int = self._listening.getsockname()[1]
        self.url = url(settings.host, self.port, secure=False)
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.token.reveal()}"}, timeout=LIMIT
        )
        self.thread = threading.Thread(target=run, args=(self.server, self._listening), daemon=True)

    def start(self) -> Running:
        self.thread.start()
        waiting = threading.Event()
        for _ in range(1200):
            if self.service.worker.ready and self.server.started:
                self.gate.calls.clear()
                return self
            assert self.service.worker.failure is None, self.service.worker.failure
            waiting.wait(0.1)
        raise AssertionError("the server does not become ready")

    def stop(self) -> None:
        self.gate.open.set()
        self.server.stop()
        self.thread.join(LIMIT)
        self.http.close()
        assert not self.thread.is_alive()

    def metric(self, line: str) -> float:
        """The value of a line of ``/metrics``."""
        found = [one for one in self.http.get("/metrics").text.splitlines() if one.startswith(line + " ")]
        return float(found[0].split()[-1]) if found else 0.0


#: Small limits, which tests can reach.
LIMITS: dict[str, Any] = {"upload_mb": 0.3, "megapixels": 0.1, "steps": 60, "queue": 8, "upload_timeout": 20.0}


@pytest.fixture(scope="session")
def shared_root(make_shared: Callable[..., Path]) -> Path:
    """The tiny bundle with one UNet for all tasks."""
    return make_shared()


@pytest.fixture(scope="module")
def server(shared_root: Path) -> Iterator[Running]:
    """A server that a module's tests share."""
    running = Running(Settings(shared_root, **LIMITS)).start()
    yield running
    running.stop()


@pytest.fixture
def start(shared_root: Path) -> Iterator[Callable[..., Running]]:
    """``start(queue=1, …)``: a server of a test's own, with these settings."""
    started: list[Running] = []

    def get(**changes: Any) -> Running:
        settings = replace(Settings(shared_root, **LIMITS), **changes)
        started.append(Running(settings).start())
        return started[-1]

    yield get
    for one in started:
        one.stop()
