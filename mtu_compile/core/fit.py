"""What becomes of a picture of other proportions than the engine's; ``mtu_compile.runtime.fitting`` does it."""

from __future__ import annotations

from typing import Literal, get_args

#: ``crop`` takes the middle, ``pad`` repeats the outermost pixels around the whole, ``stretch`` distorts.
Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)
