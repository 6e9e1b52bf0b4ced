"""The types and ranges of a manifest's values. Generous: they keep out what is senseless, not what is unusual."""

from __future__ import annotations

import re
from typing import Annotated

from mtu_compile.core.routing import Routing as Routing
from mtu_compile.core.schema import Range, Rule


def _is_text(value: str) -> bool:
    """Terminals obey some control characters, so that a bundle could write what it likes on one."""
    return all(letter.isprintable() or letter in "\n\t" for letter in value)


def matches(pattern: str, expected: str) -> Rule:
    """A text that a regular expression fits as a whole, called ``expected`` in words."""
    compiled = re.compile(pattern)
    return Rule(lambda value: compiled.fullmatch(value) is not None, expected, pattern)


Text = Annotated[str, Rule(_is_text, "text without control characters")]
#: What something is called: a target, a kind of engine, a pass.
Name = Annotated[str, matches(r"[A-Za-z0-9][A-Za-z0-9_.:+-]{0,99}", "a name of letters, digits and '_.:+-'")]
Sha256 = Annotated[str, matches(r"[0-9a-f]{64}", "a SHA-256 in hexadecimal")]
#: ``"8.7"``, ``"3.10"``, ``"2026.4.1"``, ``"2.13.0+cpu"``.
Version = Annotated[str, matches(r"[0-9A-Za-z][0-9A-Za-z.+_!-]{0,99}", "a version")]

Bytes = Annotated[int, Range(0, 2**53)]
Count = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[int, Range(1, 2**31 - 1)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
#: Denoising steps; what ``--steps`` takes.
Steps = Annotated[int, Range(1, 1000)]
#: Of a picture, in pixels; so large that no device of today makes one.
Side = Annotated[int, Range(1, 32768)]
Channels = Annotated[int, Range(1, 1024)]
#: Tokens of a prompt.
Length = Annotated[int, Range(1, 65536)]
TokenId = Annotated[int, Range(0, 2**31 - 1)]
#: Pixels per latent cell.
Scale = Annotated[int, Range(1, 256)]
#: What a latent is multiplied by: 0.18215 for Stable Diffusion 1.5, 0.13025 for SDXL.
Factor = Annotated[float, Range(1e-6, 1e6)]

#: ``mtu_compile.accuracy.formulas`` keeps decibels from -200 to 200; differences of two of them are twice that at most.
Decibels = Annotated[float, Range(-400, 400)]
Cosine = Annotated[float, Range(-1.001, 1.001)]
Share = Annotated[float, Range(0, 1)]
Likeness = Annotated[float, Range(-1.001, 1e6)]
Ratio = Annotated[float, Range(0, 1e12)]
Milliseconds = Annotated[float, Range(0, 1e9)]
Seconds = Annotated[float, Range(0, 1e9)]
#: A timestep of the training schedule.
Timestep = Annotated[float, Range(-1, 1e6)]
Magnitude = Annotated[float, Range(0, 3.5e38)]
