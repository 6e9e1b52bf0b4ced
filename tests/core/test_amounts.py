"""Amounts, and what others' exceptions say, as people read them."""

from __future__ import annotations

import pytest

from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import first_line


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0.0 kB"),
        (1_500, "1.5 kB"),
        (12_345_678, "12.3 MB"),
        (999_000_000, "999.0 MB"),
        (3_456_000_000, "3.46 GB"),
        (-2_000_000, "-2.0 MB"),
    ],
)
def test_bytes_have_the_unit_that_suits_them(amount: int, text: str) -> None:
    assert readable(amount) == text


def test_of_an_exception_the_first_line_is_said_or_its_kind() -> None:
    assert first_line(ValueError("\n  it broke\nat line 3")) == "it broke"
    assert first_line(KeyError()) == "KeyError"
