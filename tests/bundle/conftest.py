"""A bundle of a few small files, whole but for engines that run, and keys to sign it with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtu_compile import bundle
from mtu_compile.bundle import keys
from tests.bundle.small import write_small


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A whole bundle of eight files."""
    return write_small(tmp_path / "small")


@pytest.fixture(scope="session")
def key() -> Any:
    """A private key."""
    return keys.new_private()


@pytest.fixture
def ours(key: Any) -> tuple[keys.PublicKey, ...]:
    """The keys to trust: that of ``key``."""
    return (keys.PublicKey.of(key, "the release team"),)


@pytest.fixture
def signed(small: Path, key: Any) -> Iterator[Path]:
    """``small``, signed as release 7."""
    from mtu_compile.bundle import signature

    signature.sign(small, key, release=7)
    yield small
    assert (small / bundle.MANIFEST).exists()
