"""Requests that no server should answer well: what strangers, broken clients and fuzzers send."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from PIL import Image

#: Seconds for one request; none of them takes long to refuse.
_LIMIT = 900.0


@dataclass(frozen=True)
class Bad:
    """One such request.

    Attributes:
        kind: what is wrong with it.
        raw: its bytes.
        right_token: whether it shows the right token.
        cut: whether the client hangs up after them.
    """

    kind: str
    raw: bytes
    right_token: bool
    cut: bool = False


def _png(width: int = 16, height: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def bomb(width: int = 60000, height: int = 60000) -> bytes:
    """A PNG of a few bytes whose header says billions of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1 << 20), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def _head(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class BadRequests:
    """Draws bad requests of every kind, the same ones for a seed.

    Args:
        token: the right one: what is refused for other reasons has to get past it first.
        upload_bytes: the server's limit.
        seed: of the draws.
    """

    def __init__(self, token: str, upload_bytes: int, seed: int = 0) -> None:
        self._token, self._most = token, upload_bytes
        self._random = random.Random(seed)
        self.kinds: dict[str, Callable[[], Bad]] = {
            name.removeprefix("_make_"): getattr(self, name) for name in dir(self) if name.startswith("_make_")
        }

    def draw(self, kind: str | None = None) -> Bad:
        """One of ``kind``, or of any."""
        return self.kinds[kind or self._random.choice(sorted(self.kinds))]()

    def _json(self, kind: str, body: bytes, path: str = "/v1/images/generations") -> Bad:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        return Bad(kind, _head("POST", path, {**headers, "Content-Length": str(len(body))}) + body, True)

    def _form(self, kind: str, parts: list[tuple[str, bytes]], *, cut: float = 1.0, said: int | None = None) -> Bad:
        boundary = "b0undary"
        body = b"".join(
            f"--{boundary}\r\nContent-Disposition: form-data; {name}\r\n\r\n".encode() + data + b"\r\n"
            for name, data in parts
        )
        body = (body + f"--{boundary}--\r\n".encode())[: int((len(body) + 16) * cut)]
        headers = {
            "Authorization": f"Bearer {self._token}",
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(body) if said is None else said),
        }
        return Bad(kind, _head("POST", "/v1/images/edits", headers) + body, True, cut=said is not None)

    def _make_wrong_token(self) -> Bad:
        shown = self._random.choice(
            ["", "x", self._token[:-1], self._token + "x", self._token.swapcase(), "\xff" * 20, self._token[::-1]]
        )
        path = self._random.choice(
            ["/v1/models", "/v1/tasks", "/metrics", "/v1/jobs", "/", "/docs", "/openapi.json", "/healthz", "/nowhere"]
        )
        scheme = self._random.choice(["Bearer ", "Basic ", "bearer", ""])
        return Bad("wrong_token", _head("GET", path, {"Authorization": scheme + shown}), False)

    def _make_no_token(self) -> Bad:
        body = b'{"prompt": "a cat"}'
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        return Bad("no_token", _head("POST", "/v1/images/generations", headers) + body, False)

    def _make_token_twice(self) -> Bad:
        head = _head("GET", "/v1/models", {"Authorization": f"Bearer {self._token}"})
        return Bad("token_twice", head[:-2] + b"Authorization: Bearer x\r\n\r\n", False)

    def _make_malformed_json(self) -> Bad:
        whole = json.dumps({"prompt": "a cat", "n": 1, "size": "auto"}).encode()
        place = self._random.randrange(len(whole))
        damaged = self._random.choice(
            [whole[:place], whole[:place] + b"\xff" + whole[place:], b"[" * 5000, b"{" * 300 + b"}" * 300, b"", b"null"]
        )
        return self._json("malformed_json", damaged)

    def _make_wrong_types(self) -> Bad:
        values: list[object] = [-1, 0, 1e308, "7", [], {}, True, None, "x" * 5000, 10**30, "\ud800", [[1, 2], 3]]
        name = self._random.choice(
            ["n", "size", "rng_seed", "num_inference_steps", "guidance_scale", "stream", "model"]
        )
        body = {"prompt": self._random.choice([1, [], {}, True, "", " "]), name: self._random.choice(values)}
        return self._json("wrong_types", json.dumps(body).encode())

    def _make_constants(self) -> Bad:
        return self._json(
            "constants",
            b'{"prompt": "a cat", "guidance_scale": ' + self._random.choice([b"NaN", b"Infinity", b"1e999"]) + b"}",
        )

    def _make_unknown_field(self) -> Bad:
        name = self._random.choice(["prompt_2", "strength", "__proto__", "lora", "\u202e", "", "a" * 10000])
        return self._json("unknown_field", json.dumps({"prompt": "a cat", name: 1}).encode())

    def _make_beyond_limits(self) -> Bad:
        extra = self._random.choice(
            [{"n": 10**6}, {"num_inference_steps": 1000}, {"size": "8192x8192"}, {"prompt": "a" * 100_000}]
        )
        return self._json("beyond_limits", json.dumps({"prompt": "a cat", **extra}).encode())

    def _make_oversize(self) -> Bad:
        headers = {
            "Authorization": f"Bearer {self._token}",
            "Content-Type": "application/json",
            "Content-Length": str(self._most + self._random.choice([1, 10**6, 10**15])),
        }
        return Bad("oversize", _head("POST", "/v1/images/generations", headers) + b"x" * 1000, True)

    def _make_oversize_chunked(self) -> Bad:
        headers = {
            "Authorization": f"Bearer {self._token}",
            "Content-Type": "application/json",
            "Transfer-Encoding": "chunked",
        }
        chunk = f"{self._most // 4 + 1:x}\r\n".encode() + b" " * (self._most // 4 + 1) + b"\r\n"
        return Bad("oversize_chunked", _head("POST", "/v1/images/generations", headers) + chunk * 5, True)

    def _make_truncated_form(self) -> Bad:
        parts = [('name="prompt"', b"red"), ('name="image"; filename="a.png"', _png(64, 64))]
        cut = self._random.uniform(0.05, 0.95)
        said = self._random.choice([None, 100_000])
        return self._form("truncated_form", parts, cut=cut, said=said)

    def _make_odd_form(self) -> Bad:
        image = ('name="image"; filename="a.png"', _png())
        parts = self._random.choice(
            [
                [('name="prompt"', b"red")],
                [('name="prompt"', b"red"), ('name="prompt"', b"blue"), image],
                [('name="prompt"', b"red"), image, image],
                [('name="prompt"', b"red"), ('name="image"', _png())],
                [('name="prompt"', b"red"), ('name="mask"; filename="a.png"', _png())],
                [("filename=x", b"red"), image],
                [('name="prompt"', b"red"), ('name="../../etc/passwd"; filename="../../x"', b"x"), image],
                [(f'name="f{i}"', b"x") for i in range(200)],
            ]
        )
        return self._form("odd_form", parts)

    def _make_garbage_picture(self) -> Bad:
        whole = _png(64, 64)
        place = self._random.randrange(8, len(whole) - 40)  # a PNG without its last chunk is still a picture
        data = self._random.choice(
            [
                self._random.randbytes(self._random.randrange(2000)),
                whole[:place],
                bomb(),
                bomb(1, 2**31 - 1),
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
                b"GIF89a" + bytes(50),
                b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(30),
                b"\xff\xd8\xff\xe0" + self._random.randbytes(300),
                b"",
            ]
        )
        return self._form("garbage_picture", [('name="prompt"', b"red"), ('name="image"; filename="a.png"', data)])

    def _make_garbage_base64(self) -> Bad:
        picture = self._random.choice(
            ["%%%", "data:image/png;base64,!", base64.b64encode(bomb()).decode(), 7, ["x"], "="]
        )
        return self._json("garbage_base64", json.dumps({"image": picture}).encode(), "/v1/tasks/sr")

    def _make_wrong_content_type(self) -> Bad:
        kind = self._random.choice(
            ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "\xe9"]
        )
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind, "Content-Length": "2"}
        return Bad("wrong_content_type", _head("POST", "/v1/images/generations", headers) + b"{}", True)

    def _make_nowhere(self) -> Bad:
        path = self._random.choice(
            ["/v2", "/v1/tasks/none", "/../../etc/passwd", "/v1/%00", "/page/../token", "/v1/models/x"]
        )
        method = self._random.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW"])
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json", "Content-Length": "2"}
        return Bad("nowhere", _head(method, path, headers) + b"{}", True)

    def _make_other_host(self) -> Bad:
        raw = _head("GET", "/", {})
        host = self._random.choice([b"evil.example", b"127.0.0.1.evil.example", b"", b"a b", b"[", b"localhost:x"])
        return Bad("other_host", raw.replace(b"127.0.0.1", host, 1), False)

    def _make_other_origin(self) -> Bad:
        headers = {"Origin": self._random.choice(["https://evil.example", "null", "http://127.0.0.1:1", "x"])}
        return Bad("other_origin", _head("GET", "/", headers), False)

    def _make_not_http(self) -> Bad:
        raw = self._random.choice(
            [
                self._random.randbytes(200),
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
                b"GET / HTTP/9.9\r\n\r\n",
                b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n",
                b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000,
                b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
                b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
                b"",
            ]
        )
        return Bad("not_http", raw, False, cut=True)


def send(host: str, port: int, bad: Bad) -> tuple[int | None, bytes]:
    """Send a request as it is: the status and the whole answer; ``None`` if the server hung up without one.

    Raises:
        TimeoutError: the server neither answered nor hung up.
    """
    answer = b""
    with socket.create_connection((host, port), timeout=_LIMIT) as connection:
        try:
            connection.sendall(bad.raw)
            if bad.cut:
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has said all it wanted to before it read all
        try:
            while piece := connection.recv(65536):
                answer += piece
                if _is_whole(answer):
                    break
        except ConnectionResetError:
            pass
    if not answer:
        return None, b""
    return int(answer.split(b" ", 2)[1]), answer


def _is_whole(answer: bytes) -> bool:
    """Whether an answer of known length is there, after which the server may keep the connection."""
    head, found, body = answer.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return bool(found) and len(body) >= int(line.split(b":")[1])
    return False
