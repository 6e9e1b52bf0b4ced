"""What the operator decides: one table, from which both command lines (click's and argparse's) are made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mtu_compile.core.errors import ConfigError


def about(text: str, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Of a field that is an option of the command: its help; numbers go from ``low`` to ``high``."""
    return {"help": text, "low": low, "high": high}


@dataclass(frozen=True)
class Settings:
    """Everything about one server. The fields are the options, and their ``help`` says what they mean."""

    bundle: Path
    host: str = field(
        default="127.0.0.1", metadata=about("Address to listen at; only this machine can reach 127.0.0.1.")
    )
    port: int = field(default=8700, metadata=about("Port to listen at; 0 for any free one.", 0, 65535))
    follow: bool = field(
        default=False,
        metadata=about(
            "BUNDLE leads through a link, as a board's current/bundle does: when that is pointed elsewhere, answer "
            "what was taken, and go over to what it leads to then, losing no request. Needs --token-file."
        ),
    )
    fd: int | None = field(
        default=None,
        metadata=about(
            "Listen at this open socket, for supervisors that keep it; --host and --port do not matter then."
        ),
    )
    token_file: Path | None = field(
        default=None,
        metadata=about(
            "File of the token (mode 0600), made if it is missing; without it, each start has a token of its own."
        ),
    )
    trust: tuple[Path, ...] = field(
        default=(), metadata=about("Public key: refuse a bundle that none of these keys signed. Repeatable.")
    )
    allow_host: tuple[str, ...] = field(
        default=(),
        metadata=about("Name under which clients reach this server, beside localhost and plain addresses. Repeatable."),
    )
    allow_origin: tuple[str, ...] = field(
        default=(), metadata=about("Web origin (https://app.example) whose pages may ask. Repeatable.")
    )
    tls_cert: Path | None = field(default=None, metadata=about("Certificate chain (PEM): serve HTTPS."))
    tls_key: Path | None = field(default=None, metadata=about("Its private key (PEM)."))
    queue: int = field(
        default=32,
        metadata=about("Requests at a time, waiting or being worked on; further ones are refused (429).", 1, 4096),
    )
    samples: int = field(
        default=12, metadata=about("UNet samples of one call at most, as memory grows with them.", 1, 256)
    )
    pictures: int = field(default=4, metadata=about("Pictures of one request (n) at most.", 1, 100))
    steps: int = field(default=100, metadata=about("Denoising steps of a picture at most.", 1, 1000))
    prompt_chars: int = field(default=4000, metadata=about("Characters of a prompt at most.", 1, 1_000_000))
    upload_mb: float = field(default=20.0, metadata=about("Megabytes of a request's body at most.", 0.001, 1000))
    megapixels: float = field(
        default=16.0, metadata=about("Millions of pixels of an uploaded picture, once decoded, at most.", 0.0001, 64)
    )
    timeout: float = field(
        default=300.0, metadata=about("Seconds from a request to its answer at most, waiting included.", 0.1, 86400)
    )
    upload_timeout: float = field(default=30.0, metadata=about("Seconds a client has to send a request.", 0.1, 3600))
    grace: float = field(default=30.0, metadata=about("Seconds that requests have to end in after SIGTERM.", 0, 3600))

    @property
    def upload_bytes(self) -> int:
        return int(self.upload_mb * 1e6)

    @property
    def pixels(self) -> int:
        return int(self.megapixels * 1e6)

    def check(self) -> None:
        """``ConfigError`` naming an option whose value is impossible."""
        for one in options():
            value = getattr(self, one.name)
            low, high = one.low, one.high
            if low is not None and high is not None and not low <= value <= high:
                raise ConfigError(f"{one.flag} {value:g} is impossible", hint=f"give a number from {low:g} to {high:g}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("a certificate and its key go together", hint="give --tls-cert and --tls-key")
        if self.follow and self.token_file is None:
            raise ConfigError("--follow without a token that outlives a version", hint="give --token-file")
        for origin in self.allow_origin:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ConfigError(
                    f"{origin!r} is no web origin", hint="give scheme, host and port: https://app.example"
                )


@dataclass(frozen=True)
class Option:
    """One option of the command lines.

    Attributes:
        kind: ``int``, ``float``, ``str``, ``Path``, or ``bool`` for what is said or not.
        many: it may be given several times.
    """

    name: str
    kind: type
    many: bool
    default: Any
    text: str
    low: float | None
    high: float | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def options() -> Iterator[Option]:
    """The options, in order: every field of ``Settings`` but the bundle."""
    hints = get_type_hints(Settings)
    for one in fields(Settings):
        if "help" in one.metadata:
            inner = [kind for kind in get_args(hints[one.name]) if kind not in (type(None), Ellipsis)]
            kind = inner[0] if inner else hints[one.name]
            many = isinstance(one.default, tuple)
            about = one.metadata
            yield Option(one.name, kind, many, one.default, about["help"], about["low"], about["high"])
