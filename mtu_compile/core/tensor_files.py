"""Safetensors files that are the same bytes whenever they hold the same."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def order_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which ``safetensors`` writes in another order each time.

    The header keeps its length, and the tensors their places.

    Raises:
        ValueError: the header is longer when Python writes it, so it has to stay as it is.
    """
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(written) != length:
            raise ValueError(f"the header of {path} has {length} bytes, and not {len(written)}")
        file.seek(8)
        file.write(written)
