"""Ed25519 keys (RFC 8032) of those who sign bundles, in the files that OpenSSH and OpenSSL have for them.

A key is called as ``ssh-keygen -l -f KEY.pub`` calls it, so that people can compare it over the phone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtu_compile.bundle import ed25519
from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import ConfigError, InputError, ToolchainMissing

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_ALGORITHM = "ssh-ed25519"
#: Bytes of a file of keys; one key takes a hundred.
_MOST = 1 << 20


@dataclass(frozen=True)
class PublicKey:
    """Whose signatures are good.

    Attributes:
        raw: the 32 bytes of RFC 8032.
        comment: what its file says beside it, usually whose it is. Nothing depends on it.
    """

    raw: bytes
    comment: str = ""

    @property
    def key_id(self) -> str:
        """OpenSSH's fingerprint of it: ``"SHA256:"`` and 43 letters of base64."""
        digest = base64.b64encode(hashlib.sha256(self._blob()).digest()).decode().rstrip("=")
        return f"SHA256:{digest}"

    @property
    def line(self) -> str:
        """It as OpenSSH writes it, on a line without an end: ``ssh-ed25519 AAAA… comment``."""
        return f"{_ALGORITHM} {base64.b64encode(self._blob()).decode()} {self.comment}".rstrip()

    def signed(self, signature: bytes, message: bytes) -> bool:
        """Whether ``signature`` (64 bytes) is this key's, of ``message``."""
        try:
            from cryptography.exceptions import InvalidSignature
        except ImportError:  # a board
            return ed25519.verify(self.raw, signature, message)
        try:
            _ed25519().Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def _blob(self) -> bytes:
        """RFC 8709: the algorithm's name and the key, each after its length."""
        return b"".join(len(part).to_bytes(4, "big") + part for part in (_ALGORITHM.encode(), self.raw))

    @classmethod
    def of(cls, key: Ed25519PrivateKey | Ed25519PublicKey, comment: str = "") -> PublicKey:
        """What ``cryptography`` holds, as one of ours."""
        public = key.public_key() if hasattr(key, "public_key") else key
        return cls(public.public_bytes_raw(), comment)


def new_private() -> Ed25519PrivateKey:
    """A new key from the system's own source of randomness."""
    made: Ed25519PrivateKey = _ed25519().Ed25519PrivateKey.generate()
    return made


def write_pair(path: Path, key: Ed25519PrivateKey, *, comment: str = "", passphrase: str | None = None) -> PublicKey:
    """Write ``path`` (PKCS 8 in PEM, readable for its owner alone) and ``path.pub`` (OpenSSH's form).

    Raises:
        ConfigError: one of them exists, or the comment has control characters.
    """
    from cryptography.hazmat.primitives import serialization

    public_path = public_of(path)
    check_free(path)
    if not comment.isprintable():
        raise ConfigError(f"{comment!r} is no comment", hint="one line of text")
    hidden: Any = serialization.NoEncryption()
    if passphrase is not None:
        hidden = serialization.BestAvailableEncryption(passphrase.encode())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    public = PublicKey.of(key, comment)
    with atomic_file(path) as secret, atomic_file(public_path) as open_to_all:
        descriptor = os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor: never readable for others, not for a moment
            file.write(pem)
        open_to_all.write_text(public.line + "\n", encoding="utf-8", newline="\n")
    return public


def check_free(path: Path) -> None:
    """``ConfigError`` if a pair of keys cannot be written to ``path`` and ``path.pub``: keys are never replaced."""
    for one in (path, public_of(path)):
        if os.path.lexists(one):
            raise ConfigError(f"{str(one)!r} already exists", hint="keys are not replaced; choose another name")
    if not path.parent.is_dir():
        raise ConfigError(f"{str(path.parent)!r} is not a folder", hint="make it first: mkdir -p")


def public_of(path: Path) -> Path:
    """Where the public half of the key in ``path`` lies."""
    return path.with_name(f"{path.name}.pub")


def read_private(path: Path, passphrase: str | None = None) -> Ed25519PrivateKey:
    """The private key in ``path``, PEM or OpenSSH's.

    Raises:
        ConfigError: there is none; others can read it.
        InputError: it is no Ed25519 key, or the passphrase is wrong; with ``needs_passphrase`` if it wants one.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    content = _content(path)
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(f"{str(path)!r} can be read by others, and is a private key", hint=f"chmod 600 {path}")
    load: Any = serialization.load_pem_private_key
    if b"BEGIN OPENSSH PRIVATE KEY" in content:
        load = serialization.load_ssh_private_key
    try:
        key = load(content, None if passphrase is None else passphrase.encode())
    except TypeError as error:
        if passphrase is None:
            raise NeedsPassphrase(f"{str(path)!r} is behind a passphrase", hint="--passphrase-file FILE") from error
        raise InputError(f"{str(path)!r} has no passphrase, and one was given") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        wrong = "is not a private key" if passphrase is None else "is not a private key, or has another passphrase"
        raise InputError(f"{str(path)!r} {wrong}: {error}", hint="mtu-compile key new makes one") from error
    if not isinstance(key, _ed25519().Ed25519PrivateKey):
        raise InputError(f"{str(path)!r} is a {type(key).__name__}", hint="bundles are signed with Ed25519 keys")
    found: Ed25519PrivateKey = key
    return found


class NeedsPassphrase(InputError):
    """A private key that cannot be read without one."""


def read_trusted(paths: Iterable[Path]) -> tuple[PublicKey, ...]:
    """All public keys in files: lines of OpenSSH's (empty ones and ``#`` are skipped), or PEM; each key once.

    Raises:
        ConfigError: a file is missing.
        InputError: it has anything but Ed25519 public keys, or none.
    """
    found: dict[bytes, PublicKey] = {}
    for path in paths:
        keys = _public_keys(path, _content(path))
        if not keys:
            raise InputError(f"{str(path)!r} has no keys", hint="write a public key (mtu-compile key show) into it")
        for key in keys:
            found.setdefault(key.raw, key)
    return tuple(found.values())


def _public_keys(path: Path, content: bytes) -> list[PublicKey]:
    if b"PRIVATE KEY" in content:
        raise InputError(f"{str(path)!r} is a private key", hint="give boards the public one, KEY.pub")
    if content.lstrip().startswith(b"-----BEGIN"):
        return [_from_pem(path, content)]
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise _no_key(path) from error
    return [_from_line(path, line.strip()) for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _from_line(path: Path, line: str) -> PublicKey:
    """One line of OpenSSH's; read here, as it is what boards read and its form is fixed to the byte."""
    algorithm, _, rest = line.partition(" ")
    coded, _, comment = rest.strip().partition(" ")
    try:
        blob = base64.b64decode(coded, validate=True)
    except (ValueError, binascii.Error) as error:
        raise _no_key(path) from error
    key = PublicKey(blob[-32:], comment.strip() if comment.isprintable() else "")
    if algorithm != _ALGORITHM or key._blob() != blob:
        raise _no_key(path)
    return key


def _from_pem(path: Path, content: bytes) -> PublicKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    kind = _ed25519().Ed25519PublicKey
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(path) from error
    if not isinstance(key, kind):
        raise _no_key(path)
    return PublicKey.of(key)


def _no_key(path: Path) -> InputError:
    return InputError(
        f"{str(path)!r} is not a file of Ed25519 public keys", hint="lines such as: ssh-ed25519 AAAA… (KEY.pub)"
    )


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise ConfigError(f"there is no key in {str(path)!r}", hint="name a file; mtu-compile key new makes keys")
    with path.open("rb") as file:
        content = file.read(_MOST + 1)
    if len(content) > _MOST:
        raise InputError(f"{str(path)!r} is too long for keys")
    return content


def _ed25519() -> Any:
    """``cryptography``, which only those need who ask for signatures."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519 as found
    except ImportError as error:
        raise ToolchainMissing(
            "signatures need the package cryptography, which is not installed", hint="pip install 'mtu-compile[deploy]'"
        ) from error
    return found
