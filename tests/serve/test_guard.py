"""Who may ask: tokens, hosts, origins; and that nobody else gets anything."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.bad_requests import Bad, BadRequests, send
from mtu_compile.core.errors import ConfigError
from mtu_compile.serve.guard import OPEN_PATHS
from mtu_compile.serve.token import kept_token, new_token
from tests.serve.conftest import Running

API = ("/v1/models", "/v1/models/tiny", "/v1/tasks", "/v1/jobs", "/metrics", "/v1/images/generations", "/nowhere")


@pytest.mark.parametrize("path", API)
def test_without_the_token_there_is_nothing(server: Running, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "OPTIONS", "HEAD"):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", [*API, *sorted(OPEN_PATHS)])
def test_a_wrong_token_gets_nothing_not_even_what_is_open(server: Running, path: str) -> None:
    right = server.token.reveal()
    for shown in ("Bearer wrong", f"Bearer {right}x", f"Bearer {right[:-1]}", f"Basic {right}", right, "Bearer", ""):
        answer = httpx.get(server.url + path, headers={"Authorization": shown})
        assert (answer.status_code, set(answer.json())) == (401, {"error"}), shown
    bad = Bad("twice", f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode(), False)
    both = f"Authorization: Bearer {right}\r\nAuthorization: Bearer x\r\n\r\n".encode()
    assert send("127.0.0.1", server.port, Bad("twice", bad.raw + both, False))[0] == 401


def test_what_is_open_says_nothing_of_the_bundle(server: Running) -> None:
    for path in OPEN_PATHS:
        answer = httpx.get(server.url + path)
        assert answer.status_code in (200, 204)
        assert "tiny" not in answer.text and "t2i" not in answer.text.replace('t2i: "Create"', "")


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1", "[::1]:80", "192.168.1.7", "LOCALHOST."])
def test_plain_addresses_are_answered(server: Running, host: str) -> None:
    assert httpx.get(server.url + "/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80"])
def test_a_name_that_was_led_here_is_not(server: Running, host: str) -> None:
    answer = server.http.get("/v1/models", headers={"Host": host})
    assert answer.status_code == 421 and "--allow-host" in answer.json()["error"]["message"]


def test_other_sites_pages_are_refused_and_its_own_are_not(server: Running) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", server.url.replace("http", "https")):
        assert server.http.get("/v1/models", headers={"Origin": origin}).status_code == 403
    assert server.http.get("/v1/models", headers={"Origin": server.url}).status_code == 200


def test_allowed_names_and_origins(start: Callable[..., Running]) -> None:
    server = start(allow_host=("board.lan",), allow_origin=("https://app.example",))
    assert server.http.get("/v1/models", headers={"Host": "Board.LAN:80"}).status_code == 200
    answer = server.http.get("/v1/models", headers={"Origin": "https://app.example"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://app.example")
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    preflight = httpx.options(server.url + "/v1/images/generations", headers=asked)  # browsers show no token in these
    assert preflight.status_code == 200 and "POST" in preflight.headers["access-control-allow-methods"]
    assert server.http.get("/v1/models", headers={"Origin": "https://other.example"}).status_code == 403


def test_browsers_are_told_to_run_and_load_nothing_from_elsewhere(server: Running) -> None:
    headers = httpx.get(server.url).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
    assert "server" not in headers and server.http.get("/v1/models").headers["cache-control"] == "no-store"


def test_bad_requests_of_every_kind_are_refused_and_leave_the_server_well(server: Running) -> None:
    """What ``bench/serve.py`` sends ten thousand of."""
    source = BadRequests(server.token.reveal(), server.service.settings.upload_bytes, seed=5)
    for kind in source.kinds:
        for _ in range(12):
            bad = source.draw(kind)
            status, answer = send("127.0.0.1", server.port, bad)
            what = (kind, status, answer[-300:], bad.raw[:200])
            assert (status is None and bad.cut) or (status is not None and 400 <= status < 500), what
            assert b'"b64_json"' not in answer and server.token.reveal().encode() not in answer, what
    assert server.service.waiting.taken == 0
    assert server.http.get("/healthz").status_code == 200
    made = server.http.post("/v1/images/generations", json={"prompt": "a", "num_inference_steps": 1})
    assert made.status_code == 200


def test_connections_that_say_nothing_are_closed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtu_compile.serve.server._HEAD_SECONDS", 0.3)
    for said in (b"", b"GET / HT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(said)
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert (b" 200 " in answer) is said.endswith(b"\r\n\r\n")  # the last one is answered first


def test_a_body_that_does_not_come_is_not_waited_for(start: Callable[..., Running]) -> None:
    server = start(upload_timeout=0.3)
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
        f"Content-Type: application/json\r\nAuthorization: Bearer {server.token.reveal()}\r\n\r\n"
    )
    assert send("127.0.0.1", server.port, Bad("slow", head.encode(), True))[0] == 408
    assert server.service.waiting.taken == 0


def test_a_kept_token_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "token"
    first, second = kept_token(path), kept_token(path)
    assert first.reveal() == second.reveal() and path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="others than its owner"):
        kept_token(path)
    for text in ("short", "with spaces in it, and long enough"):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match="no token"):
            kept_token(path)
    with pytest.raises(ConfigError):
        kept_token(tmp_path / "nowhere" / "token")


def test_tokens_are_random_compared_whole_and_do_not_show_themselves() -> None:
    token = new_token()
    text = token.reveal()
    assert len(text) >= 43 and text != new_token().reveal()
    assert token.matches(text) and not any(map(token.matches, ("", text[:-1], text + "x", text.swapcase(), "é")))
    assert text not in repr(token) and text not in f"{token}"


@pytest.fixture(autouse=True)
def _still_well(server: Running) -> Any:
    yield
    assert server.service.worker.alive
