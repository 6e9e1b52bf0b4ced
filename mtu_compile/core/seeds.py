"""Which seeds there are: the same for every command and function that draws random numbers."""

from __future__ import annotations

import operator

from mtu_compile.core.errors import ConfigError

#: The largest number that is one in every language's 64-bit integer; what is added to a seed (the index of a picture)
#: leaves it below the 2**64 of torch's generators.
MAX_SEED = 2**63 - 1


def check_seed(seed: int) -> int:
    """``seed`` as a plain ``int``; ``ConfigError`` unless it is a whole number from 0 to ``MAX_SEED``."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number <= MAX_SEED:
        raise ConfigError(f"{seed!r} is not a seed", hint=f"take a whole number from 0 to {MAX_SEED}")
    return number
