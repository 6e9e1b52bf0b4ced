"""What a mask selects: by its white, or by its transparency."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtu_compile.core.errors import ConfigError, InputError
from mtu_compile.core.notices import Notice

Array = NDArray[Any]

#: What selects a pixel: white, transparency, or transparency if the mask has any.
MaskMode = Literal["auto", "white", "alpha"]
MASK_MODES: tuple[MaskMode, ...] = get_args(MaskMode)

#: From here on a grey is white, and a pixel opaque.
_HALF = 128
#: A grey that nobody would call anything but white.
_WHITE = 250


def read_mask(mask: Image.Image, mode: MaskMode = "auto") -> tuple[Image.Image, tuple[Notice, ...]]:
    """A mask as black and white (mode L, its own size, white where to repaint), and what there is to say of it.

    Transparency selects as in OpenAI's Images API, where the mask is the picture with a hole in it. A mask whose
    greys are only 0 and 1 is taken for what it was before somebody saved it: 1 is white.

    Args:
        mask: a picture of any mode.
        mode: ``"auto"`` goes by transparency where a pixel is more transparent than not, else by white.

    Raises:
        ConfigError: an unknown mode.
        InputError: mode ``"alpha"``, and the mask has no transparency at all.
    """
    if mode not in MASK_MODES:
        raise ConfigError(f"masks are not read by {mode!r}", hint=f"take one of {', '.join(MASK_MODES)}")
    opaque = np.ones((mask.height, mask.width), bool)
    if mask.has_transparency_data:
        opaque = np.asarray(mask.convert("RGBA").getchannel("A")) >= _HALF
    elif mode == "alpha":
        raise InputError("the mask has no transparency", hint="--mask-mode white goes by its white")
    grey = np.asarray(mask.convert("RGBA" if mask.mode in ("P", "PA") else mask.mode).convert("L"))
    if mode == "alpha" or (mode == "auto" and not opaque.all()):
        # of white strokes on nothing, and a picture with a hole, only the first is all white where it is seen
        strokes = mode == "auto" and opaque.any() and bool((grey[opaque] >= _WHITE).all())
        return _picture(~opaque), (_STROKES,) if strokes else ()
    levels = grey[opaque]
    if levels.size and levels.max() == 1:
        return _picture(opaque & (grey == 1)), (_ZERO_ONE,)
    return _picture(opaque & (grey >= _HALF)), ()


def check_selection(selected: Array, in_latent: Array) -> tuple[Notice, ...]:
    """What there is to say of a mask that selects nothing, or everything.

    Args:
        selected: [H, W], 1 where to repaint, as fitted to the engine's picture.
        in_latent: [h, w], the same at the latent's size.
    """
    pixels = int(selected.sum())
    facts = {"pixels": pixels, "of": int(selected.size)}
    if pixels == 0:
        return (Notice("mask-empty", "the mask selects nothing, so nothing is repainted", _LOOK, facts),)
    if pixels == selected.size:
        return (Notice("mask-full", "the mask selects all of the picture, so nothing of it is kept", _LOOK, facts),)
    if not in_latent.any():
        where = f"the mask selects {pixels} pixels, too few for the latent's {in_latent.shape[1]}x{in_latent.shape[0]}"
        return (Notice("mask-lost", f"{where}, so the model does not see it", "paint a larger area", facts),)
    return ()


def _picture(selected: Array) -> Image.Image:
    return Image.fromarray((selected * 255).astype(np.uint8))


_LOOK = "white selects, or what is transparent if anything is (--mask-mode), and only what --fit leaves of it counts"

_ZERO_ONE = Notice(
    "mask-zero-one", "the mask's greys are 0 and 1 only, so 1 is taken for white", "save it with 0 and 255 to be sure"
)
_STROKES = Notice(
    "mask-alpha",
    "what is transparent in the mask is repainted, and what is left of it is all white",
    "--mask-mode white repaints what is white instead",
)
