"""Pictures in and out: opened safely, flattened on white, and as arrays."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import AccuracyError, ConfigError, InputError, MtuError

Array = NDArray[Any]

#: Formats that are decoded. Not all that Pillow knows: for EPS, say, it starts Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
#: Suffixes a result can be saved under.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
#: Pixels. Pillow's own limit for a picture it opens without a warning (89 million) is 256 MB of RGB; photos of
#: current phones have 50 million.
MAX_PIXELS = 64_000_000

_HINT = f"give a picture in one of the formats {', '.join(FORMATS)}"


def open_image(source: Image.Image | Path | str, what: str = "picture") -> Image.Image:
    """A fully decoded picture, turned upright as its EXIF data say.

    Args:
        source: a file, or a picture that is already open.
        what: how to call it in an error ("mask").

    Raises:
        InputError: no such file, not a picture, damaged, truncated, or unreasonably large.
    """
    if isinstance(source, Image.Image):
        return _decoded(source, what)
    path = Path(source)
    if not path.is_file():  # a pipe or device would hang or never end
        problem = "is not a file" if path.exists() else "does not exist"
        raise InputError(f"{what} {str(path)!r} {problem}", hint=_HINT)
    try:
        with Image.open(path, formats=FORMATS) as picture:
            return _decoded(picture, f"{what} {str(path)!r}")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{what} {str(path)!r} is not a picture", hint=_HINT) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{what} {str(path)!r} is too large: {error}", hint="scale it down first") from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, …
        raise InputError(f"{what} {str(path)!r} cannot be read: {error}", hint=_HINT) from error


def open_mask(source: Image.Image | Path | str) -> Image.Image:
    """A mask, opened like a picture."""
    return open_image(source, "mask")


def check_writable(path: Path) -> None:
    """``ConfigError`` unless a picture could be saved as ``path``: asked before the work, not after it."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{str(path)!r} does not say a picture format", hint=f"end it in {', '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"is in a folder that does not exist, {str(path.parent)!r}"
        raise ConfigError(f"{str(path)!r} {problem}", hint="name a file in an existing folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{str(path)!r} cannot be written", hint="name a file in a folder you may write")


def save(picture: Image.Image, path: Path) -> None:
    """Write ``picture`` in the format of the file's suffix, whole or not at all.

    Raises:
        ConfigError: see ``check_writable``.
        MtuError: the disk is full, or the file cannot be written.
    """
    check_writable(path)
    try:
        with atomic_file(path) as temporary:
            picture.save(temporary, quality=95)
    except OSError as error:
        raise MtuError(
            f"{str(path)!r} cannot be written: {error.strerror or error}", hint="is the disk full?"
        ) from error


def _decoded(picture: Image.Image, what: str) -> Image.Image:
    width, height = picture.size
    if width * height > MAX_PIXELS:  # known from the header, before anything is decompressed
        raise InputError(f"{what} is too large: {width} x {height} pixels", hint="scale it down first")
    if picture.mode in ("I", "F"):
        raise InputError(f"{what} has no defined range of brightness (mode {picture.mode!r})", hint=_HINT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        picture.load()
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I;16"):  # Pillow's own conversion to 8 bits cuts off instead of scaling
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright


def flatten(picture: Image.Image) -> Image.Image:
    """RGB, with transparent pixels on white."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def shrink_mask(mask: Array, size: tuple[int, int]) -> Array:
    """Nearest neighbour, [H, W] → ``size`` (height, width); the pixel taken is the one in the middle of each cell."""
    rows = ((np.arange(size[0]) + 0.5) * mask.shape[0] / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * mask.shape[1] / size[1]).astype(np.int64)
    return mask[np.ix_(rows, columns)]


def to_array(picture: Image.Image) -> Array:
    """RGB picture → [1, 3, H, W] float32 in [-1, 1]."""
    pixels = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)[None]
    return np.ascontiguousarray(pixels) / np.float32(127.5) - np.float32(1)


def to_picture(array: Array) -> Image.Image:
    """[1, 3, H, W] in [-1, 1] (values outside are cut off) → RGB picture; ``AccuracyError`` if there are NaN or Inf."""
    if not np.isfinite(array).all():  # a NaN would become black without a word
        raise AccuracyError("a decoded picture has NaN or Inf values", hint="the VAE decoder is to blame, or its input")
    pixels = (np.clip(array[0] / 2 + 0.5, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def paste(picture: Image.Image, original: Image.Image, mask: Array) -> Image.Image:
    """``picture`` where ``mask`` [H, W] is 1, ``original`` elsewhere."""
    selected = mask[..., None] >= 0.5
    return Image.fromarray(np.where(selected, np.asarray(picture), np.asarray(original)))
