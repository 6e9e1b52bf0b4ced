"""Amounts as people read them."""

from __future__ import annotations


def readable(amount: int) -> str:
    """``12345678`` → ``"12.3 MB"``: decimal, kilobytes below a megabyte, two digits behind the point of gigabytes."""
    if abs(amount) < 1e6:
        return f"{amount / 1e3:.1f} kB"
    return f"{amount / 1e9:.2f} GB" if abs(amount) >= 1e9 else f"{amount / 1e6:.1f} MB"
