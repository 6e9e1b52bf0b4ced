"""Prompts to token ids, with the ``tokenizers`` library alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mtu_compile.core.errors import BundleError


class Tokenizer:
    """A ``tokenizer.json`` with a fixed length: what ``CLIPTokenizer(padding="max_length", truncation=True)`` gives.

    Args:
        path: the ``tokenizer.json``.
        max_length: L, tokens with the start and end tokens; longer prompts lose their tail but keep the end token.
        pad_id: fills shorter prompts, on the right.

    Raises:
        BundleError: the file is no tokenizer.
    """

    def __init__(self, path: Path, max_length: int, pad_id: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path.name} is not a tokenizer: {error}") from error
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(length=max_length, pad_id=pad_id)

    def __call__(self, prompts: Sequence[str]) -> NDArray[Any]:
        """``prompts`` (B of them) → token ids [B, L] int64."""
        return np.array([encoding.ids for encoding in self._tokenizer.encode_batch(list(prompts))], dtype=np.int64)
