"""Who vouches for a bundle, and as which release: ``signature.json`` beside ``manifest.json``.

The signature is over the SHA-256 of the manifest's bytes, which name the SHA-256 of every other file, and over the
release number. It can be checked before a byte of the manifest is parsed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mtu_compile.bundle.kinds import Sha256, matches
from mtu_compile.bundle.manifest import MANIFEST, MOST_MANIFEST_BYTES, SIGNATURE
from mtu_compile.bundle.plain import read_small
from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import BundleError, ConfigError
from mtu_compile.core.schema import Mismatch, Range, conform, parse_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from mtu_compile.bundle.keys import PublicKey

FORMAT = "mtu-signature-1"

#: Bytes; a signature has four hundred.
MOST_BYTES = 4096
#: Largest release number: what every JSON reader keeps exactly, and seconds or ``YYYYMMDDnn`` fit in.
MOST_RELEASE = 2**53 - 1

#: Nothing else that the same key signs begins like this.
_DOMAIN = b"mtu-compile: signature of a bundle\n"

_SIGN = "sign it (mtu-compile sign BUNDLE --key KEY --release N), or get a signed one"


@dataclass(frozen=True)
class Signed:
    """What a good signature says.

    Attributes:
        release: number of the release; of two bundles the later one has the larger.
        key_id: who signed.
        manifest_sha256: of the manifest that was signed, in hexadecimal.
    """

    release: int
    key_id: str
    manifest_sha256: str


@dataclass(frozen=True)
class _Record:
    """``signature.json``; its entries but the last are what is signed."""

    format: Annotated[str, matches(FORMAT, f"{FORMAT!r}")]
    key_id: Annotated[str, matches(r"SHA256:[A-Za-z0-9+/]{43}", "an OpenSSH fingerprint")]
    manifest_sha256: Sha256
    release: Annotated[int, Range(1, MOST_RELEASE)]
    signature: Annotated[str, matches(r"[0-9a-f]{128}", "128 hexadecimal digits")]

    def to_bytes(self) -> bytes:
        """The file's one and only form."""
        return _dump(asdict(self))

    def message(self) -> bytes:
        """What is signed."""
        return _DOMAIN + _dump({key: value for key, value in asdict(self).items() if key != "signature"})


def sign(bundle: Path, private_key: Ed25519PrivateKey, *, release: int) -> Path:
    """Write ``signature.json``; an earlier one is replaced. The bundle's files are not read: see ``bundle.read``.

    Raises:
        ConfigError: an impossible release number.
        BundleError: there is no manifest.
    """
    from mtu_compile.bundle.keys import PublicKey

    if type(release) is not int or not 1 <= release <= MOST_RELEASE:
        raise ConfigError(f"release {release!r} is not a whole number from 1 to {MOST_RELEASE}")
    digest = hashlib.sha256(read_small(bundle / MANIFEST, MANIFEST, MOST_MANIFEST_BYTES)).hexdigest()
    unsigned = _Record(FORMAT, PublicKey.of(private_key).key_id, digest, release, "")
    record = _Record(**{**asdict(unsigned), "signature": private_key.sign(unsigned.message()).hex()})
    with atomic_file(bundle / SIGNATURE) as partial:
        partial.write_bytes(record.to_bytes())
    return bundle / SIGNATURE


def verify(bundle: Path, trusted: Sequence[PublicKey]) -> Signed:
    """Who of ``trusted`` signed the bundle's manifest. Only manifest and signature are read, and neither is obeyed.

    Whoever goes on to read the bundle says ``bundle.read(bundle, trusted=…)`` instead, which does both on the same
    bytes.

    Raises:
        BundleError: no signature, by nobody trusted, not of this manifest, or not in its one and only form.
        ToolchainMissing: ``cryptography`` is not installed.
    """
    manifest = read_small(bundle / MANIFEST, MANIFEST, MOST_MANIFEST_BYTES)
    return verify_bytes(manifest, read_signature(bundle), trusted)


def read_signature(bundle: Path) -> bytes | None:
    """``signature.json`` as it lies there; ``None`` if the bundle has none."""
    path = bundle / SIGNATURE
    if not path.is_symlink() and not path.exists():
        return None
    return read_small(path, SIGNATURE, MOST_BYTES)


def verify_bytes(manifest: bytes, signature: bytes | None, trusted: Sequence[PublicKey]) -> Signed:
    """``verify`` of a manifest and a signature that are in memory."""
    if signature is None:
        raise BundleError("the bundle is not signed, and a trusted key is demanded", hint=_SIGN)
    record = parse(manifest, signature)
    signer = next((key for key in trusted if key.key_id == record.key_id), None)
    if signer is None:
        raise BundleError(
            f"the bundle is signed by {record.key_id}, which is not among the {len(trusted)} trusted keys",
            hint="get it from whom you trust; or, if that key is theirs, add it to the trusted ones",
        )
    if not signer.signed(bytes.fromhex(record.signature), record.message()):
        raise BundleError(f"{SIGNATURE} is not a signature by {record.key_id}", hint="do not use this bundle")
    return Signed(record.release, record.key_id, record.manifest_sha256)


def parse(manifest: bytes, signature: bytes) -> _Record:
    """A signature that claims to be of ``manifest``: whose it is, is not checked.

    Raises:
        BundleError: it is not in its one and only form, or of another manifest.
    """
    try:
        raw: Any = parse_json(signature.decode(), strict_keys=True)
        record = conform(_Record, raw)
    except Mismatch as mismatch:
        raise mismatch.at(SIGNATURE, error=BundleError, hint=_SIGN) from mismatch
    except ValueError as error:
        raise BundleError(f"{SIGNATURE} is not JSON: {error}", hint=_SIGN) from error
    assert isinstance(record, _Record)
    if record.to_bytes() != signature:
        raise BundleError(f"{SIGNATURE} is not written as signatures are", hint=_SIGN)
    if record.manifest_sha256 != hashlib.sha256(manifest).hexdigest():
        raise BundleError(f"{SIGNATURE} is of another {MANIFEST} than the bundle's", hint=_SIGN)
    return record


def _dump(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=2, sort_keys=True).encode() + b"\n"
