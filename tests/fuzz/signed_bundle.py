"""A small bundle that is always the same, and its signature by a key that is, too."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mtu_compile.bundle import archive, keys, signature
from tests.bundle.small import write_small


@dataclass(frozen=True)
class SignedBundle:
    """Its manifest, signature and archives, and whom to trust for it."""

    manifest: bytes
    signature: bytes
    archive: bytes
    unsigned_archive: bytes
    trusted: tuple[keys.PublicKey, ...]


@cache
def signed_bundle() -> SignedBundle:
    """Made once a process."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))  # of tests alone
    with tempfile.TemporaryDirectory() as scratch:
        root = write_small(Path(scratch) / "bundle")
        unsigned = archive.pack(root, Path(scratch) / "unsigned.tar").read_bytes()
        signature.sign(root, key, release=7)
        packed = archive.pack(root, Path(scratch) / "bundle.tar").read_bytes()
        return SignedBundle(
            (root / "manifest.json").read_bytes(),
            (root / "signature.json").read_bytes(),
            packed,
            unsigned,
            (keys.PublicKey.of(key),),
        )
