"""A server of a board's active version: a deployment and a rollback change what it serves, and lose no request."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from mtu_compile import bundle
from mtu_compile.board.store import Store
from mtu_compile.core.errors import ConfigError
from mtu_compile.serve.__main__ import parser
from mtu_compile.serve.follow import Link, words
from mtu_compile.serve.settings import Settings
from tests.board import conftest as tiny
from tests.board.local_agent import Delivery, LocalAgent
from tests.board.test_store import version_of
from tests.conftest import MadeOnce
from tests.serve.conftest import LIMIT


class Clients:
    """Ask one after the other, each on a connection of its own, until they are told to stop; keep what they got."""

    def __init__(self, address: str, token: str) -> None:
        self.address, self.headers = address, {"Authorization": f"Bearer {token}"}
        self.answers: list[int] = []
        self.errors: list[Exception] = []
        self.stopped = threading.Event()
        self.threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(3)]

    def __enter__(self) -> Clients:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(LIMIT)
            assert not thread.is_alive()

    def _ask(self) -> None:
        wish = {"prompt": "a red cat", "num_inference_steps": 2}
        while not self.stopped.is_set():
            try:
                url = f"{self.address}/v1/images/generations"
                self.answers.append(httpx.post(url, json=wish, headers=self.headers, timeout=LIMIT).status_code)
            except Exception as error:
                self.errors.append(error)

    def model(self) -> str:
        """What is served."""
        listed = httpx.get(f"{self.address}/v1/models", headers=self.headers, timeout=LIMIT).json()
        return str(listed["data"][0]["id"])

    def wait_for(self, model: str) -> None:
        until = time.monotonic() + LIMIT
        while self.model() != model:
            assert time.monotonic() < until, f"{model} is not served"
            time.sleep(0.1)

    def wait_for_answers(self) -> None:
        """Some more."""
        until, before = time.monotonic() + LIMIT, len(self.answers)
        while len(self.answers) < before + 6:
            assert time.monotonic() < until and not self.errors, self.errors
            time.sleep(0.05)


@pytest.fixture
def board(made_once: MadeOnce, tmp_path: Path) -> Iterator[tuple[Store, LocalAgent, str]]:
    """A board on which "first" is active and "second" is proven, its agent, and the second's id."""
    original = tiny.onnxruntime_bundle(made_once)
    store = Store(tmp_path / "board")
    with LocalAgent(store.root) as agent:
        version_of(original, tmp_path / "first", tmp_path / "own").deploy(agent)
        delivery: Delivery = version_of(original, tmp_path / "second", tmp_path / "own")
        yield store, agent, delivery.deploy(agent, until="check")


@pytest.mark.heavy
def test_what_is_activated_is_served_next_and_what_is_gone_back_to_is_too_and_no_request_is_lost(
    board: tuple[Store, LocalAgent, str], tmp_path: Path
) -> None:
    store, agent, second = board
    token = tmp_path / "token"
    current = store.root / "current"
    serving = [current / "mtu-compile", "serve", current / "bundle", "--follow", "--token-file", token, "--port", 0]
    with subprocess.Popen([*map(str, serving)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip().rstrip("/")
            assert address.startswith("http://127.0.0.1:"), process.communicate(timeout=LIMIT)
            with Clients(address, token.read_text().strip()) as clients:
                clients.wait_for("first")
                clients.wait_for_answers()
                agent.ask("activate", version=second)
                clients.wait_for("second")
                clients.wait_for_answers()
                agent.ask("rollback")
                clients.wait_for("first")
                clients.wait_for_answers()
            assert not clients.errors and set(clients.answers) == {200}, (clients.errors, set(clients.answers))
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, err
        finally:
            process.kill()


def test_a_link_has_moved_once_it_leads_to_another_bundle(tmp_path: Path) -> None:
    current, one, other = (tmp_path / name for name in ("current", "one", "other"))
    for folder in (one, other):
        folder.mkdir()
        (folder / bundle.MANIFEST).write_text("{}")
    current.symlink_to(one)
    link = Link(current)
    assert not link.moved() and link.target == one.resolve()
    for elsewhere in (tmp_path / "none", tmp_path):
        current.unlink()
        current.symlink_to(elsewhere)
        assert not link.moved(), "what is no bundle is nothing to go over to"
    current.unlink()
    current.symlink_to(other)
    assert link.moved()


def test_the_next_server_is_started_as_this_one_was(tmp_path: Path) -> None:
    given = Settings(
        tmp_path / "b", port=0, follow=True, token_file=tmp_path / "t", allow_host=("a", "b"), queue=3, upload_mb=0.5
    )
    _, *rest = words(given, 7)
    assert rest[:2] == ["-m", "mtu_compile.serve"]
    values = vars(parser().parse_args(rest[2:]))
    again = Settings(**{name: tuple(one) if isinstance(one, list) else one for name, one in values.items()})
    assert again == replace(given, fd=7)


def test_following_needs_a_token_that_outlives_a_version(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--follow"):
        Settings(tmp_path, follow=True).check()
