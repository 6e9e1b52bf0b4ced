"""Signatures checked in Python alone agree with ``cryptography``, and with RFC 8032's own examples."""

from __future__ import annotations

import sys

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mtu_compile.bundle import ed25519
from mtu_compile.bundle.keys import PublicKey

#: RFC 8032, section 7.1, tests 1 and 3: key, message, signature.
RFC = (
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
)


def both(key: bytes, signature: bytes, message: bytes) -> bool:
    """What both say, who have to agree."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
        expected = True
    except (InvalidSignature, ValueError):
        expected = False
    assert ed25519.verify(key, signature, message) is expected
    return expected


@pytest.mark.parametrize(("key", "message", "signature"), RFC)
def test_the_examples_of_the_rfc_hold(key: str, message: str, signature: str) -> None:
    assert both(*map(bytes.fromhex, (key, signature, message)))


def test_any_bit_of_it_changed_is_seen() -> None:
    private, message = Ed25519PrivateKey.generate(), b"a manifest"
    key, signature = private.public_key().public_bytes_raw(), private.sign(message)
    assert both(key, signature, message)
    for place in range(0, 512, 7):
        changed = bytearray(signature)
        changed[place // 8] ^= 1 << place % 8
        assert not both(key, bytes(changed), message)
    for place in range(0, 256, 11):
        other = bytearray(key)
        other[place // 8] ^= 1 << place % 8
        assert not both(bytes(other), signature, message)
    assert not both(key, signature, message + b"!")


def test_a_scalar_beyond_the_order_is_refused() -> None:
    """Else whoever has one signature could write another of the same message."""
    private = Ed25519PrivateKey.generate()
    key, signature = private.public_key().public_bytes_raw(), private.sign(b"x")
    s = int.from_bytes(signature[32:], "little") + ed25519._L
    assert not both(key, signature[:32] + s.to_bytes(32, "little"), b"x")


@pytest.mark.parametrize("wrong", [b"", b"\xff" * 32, b"\x02" + b"\x00" * 31])
def test_what_is_no_key_signs_nothing(wrong: bytes) -> None:
    assert not ed25519.verify(wrong, b"\x00" * 64, b"x")


def test_a_board_without_cryptography_checks_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    private = Ed25519PrivateKey.generate()
    key = PublicKey.of(private)
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert key.signed(private.sign(b"x"), b"x") and not key.signed(private.sign(b"x"), b"y")
