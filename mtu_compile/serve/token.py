"""The token a client has to show: made at random, kept for its owner alone, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from mtu_compile.core.errors import ConfigError

#: Characters a token may have: what a header and a URL's fragment carry as it is (RFC 6750, section 2.1).
_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~+/=")
#: Least length; 22 of these characters are 128 bits if they are random.
_LEAST = 22


class Token:
    """A secret that does not show itself in logs or tracebacks."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._hash = hashlib.sha256(text.encode()).digest()

    def matches(self, shown: str) -> bool:
        """Whether ``shown`` is the token. The time this takes says nothing of where they differ, nor of the length."""
        return hmac.compare_digest(hashlib.sha256(shown.encode("utf-8", "replace")).digest(), self._hash)

    def reveal(self) -> str:
        """The token itself, for its owner's eyes."""
        return self._text

    def __repr__(self) -> str:
        return "Token(…)"


def new_token() -> Token:
    """A token of 256 random bits."""
    return Token(secrets.token_urlsafe(32))


def kept_token(path: Path) -> Token:
    """The token in ``path``; a new one is written there, for its owner alone, if there is no such file.

    Raises:
        ConfigError: others can read the file, or what is in it is no token.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read(path)
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}", hint="choose another file") from error
    token = new_token()
    with os.fdopen(descriptor, "w") as file:
        file.write(token.reveal() + "\n")
    return token


def _read(path: Path) -> Token:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(4096).decode("ascii", "replace").strip()
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror}", hint="choose another file") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"others than its owner may read or write {str(path)!r}", hint=f"chmod 600 {path}")
    if len(text) < _LEAST or not _CHARACTERS.issuperset(text):
        raise ConfigError(
            f"what is in {str(path)!r} is no token of at least {_LEAST} letters, digits and -._~+/=",
            hint="remove the file, and a new one is made",
        )
    return Token(text)
