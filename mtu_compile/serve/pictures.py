"""Pictures that strangers send, and those they get back."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings

from PIL import Image, UnidentifiedImageError

from mtu_compile.core.errors import InputError
from mtu_compile.runtime import images
from mtu_compile.serve.errors import ApiError
from mtu_compile.serve.wishes import OutputFormat

#: What is decoded: what OpenAI's API takes. Fewer decoders, fewer of their faults.
FORMATS = ("PNG", "JPEG", "WEBP")

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,20};base64,", re.IGNORECASE)


def decode(raw: bytes, what: str, most_pixels: int) -> Image.Image:
    """A fully decoded picture.

    Args:
        raw: the file.
        what: how to call it in an error ("picture", "mask").
        most_pixels: known from the header, before anything is decompressed.

    Raises:
        InputError: not a picture of ``FORMATS``, damaged, cut off, or too large.
    """
    hint = f"send one in one of the formats {', '.join(FORMATS)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(raw), formats=FORMATS) as picture:
                if picture.width * picture.height > most_pixels:
                    size = f"{picture.width} x {picture.height}"
                    raise InputError(f"the {what} is too large: {size}", hint=f"at most {most_pixels} pixels are taken")
                return images.open_image(picture, f"the {what}").copy()
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own, before the size is known here
        raise InputError(f"the {what} is too large", hint=f"at most {most_pixels} pixels are taken") from error
    except UnidentifiedImageError as error:
        raise InputError(f"the {what} is not a picture", hint=hint) from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, MemoryError, …
        raise InputError(f"the {what} cannot be read: {str(error)[:200]}", hint=hint) from error


def from_text(text: str, param: str) -> bytes:
    """The bytes of a picture in base64, or of a ``data:`` URL; ``ApiError`` (400) otherwise."""
    found = _DATA_URL.match(text[:60])
    try:
        return base64.b64decode(text[found.end() :] if found else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param} is not base64", "invalid_value", param) from error


def encode(picture: Image.Image, output_format: OutputFormat, quality: int) -> str:
    """``picture`` as a file, in base64."""
    file = io.BytesIO()
    if output_format == "png":
        picture.save(file, "PNG")
    else:
        picture.save(file, output_format.upper(), quality=quality)
    return base64.b64encode(file.getvalue()).decode()
