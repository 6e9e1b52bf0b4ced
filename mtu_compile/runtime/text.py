"""Prompts to token ids, with the ``tokenizers`` library alone, and what of a prompt is too long to be one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from mtu_compile.bundle.plain import GET_AGAIN
from mtu_compile.core.errors import BundleError
from mtu_compile.core.notices import Notice

#: Letters of the dropped words that a message shows; its facts have them all.
_SHOWN = 200


@dataclass(frozen=True)
class Cut:
    """What a prompt lost.

    Attributes:
        tokens: that the prompt has, without the start and end tokens.
        limit: how many there is room for.
        dropped: the words from the first on that is not seen whole, as they were written.
    """

    tokens: int
    limit: int
    dropped: str

    def notice(self, what: str = "prompt") -> Notice:
        """In words; ``what`` is ``"prompt"`` or ``"negative prompt"``."""
        shown = self.dropped if len(self.dropped) <= _SHOWN else f"{self.dropped[:_SHOWN]}…"
        return Notice(
            "prompt-cut",
            f"the {what} has {self.tokens} tokens and the text encoder takes {self.limit}: {shown!r} has no effect",
            "shorten it, or say first what matters most",
            {"prompt": what, **asdict(self)},
        )


def cut_off(prompt: str, encoding: Any) -> Cut | None:
    """What truncation took from ``prompt``, by its ``tokenizers.Encoding``; ``None`` if nothing."""
    kept, *rest = (_words(part) for part in (encoding, *encoding.overflowing))
    lost = [word for part in rest for word in part]
    if not lost:
        return None
    first, start = lost[0]
    # a word of which a part is kept is lost all the same
    start = next((begin for number, begin in kept if number == first), start)
    return Cut(len(kept) + len(lost), len(kept), prompt[start:].rstrip())


def cut_by(tokenizer: Any, prompt: str) -> Cut | None:
    """What ``prompt`` loses to the length of ``tokenizer``, one of ``transformers``; ``None`` if nothing."""
    encoded = tokenizer(prompt, max_length=tokenizer.model_max_length, truncation=True)
    return None if encoded.encodings is None else cut_off(prompt, encoded.encodings[0])


def _words(encoding: Any) -> list[tuple[int, int]]:
    """Of each token that is text: the number of its word, and where in the prompt it begins."""
    columns = (encoding.word_ids, encoding.offsets, encoding.special_tokens_mask)
    return [(word, span[0]) for word, span, special in zip(*columns, strict=True) if not special and word is not None]


@dataclass(frozen=True)
class Embedding:
    """A prompt as the UNet takes it.

    Attributes:
        states: [L, D], what it attends to: the hidden states of all text encoders side by side.
        pooled: [P], its ``text_embeds``, or ``None``.
    """

    states: NDArray[Any]
    pooled: NDArray[Any] | None = None

    @property
    def zeros(self) -> Embedding:
        """No prompt at all, to UNets that were trained so."""
        return Embedding(np.zeros_like(self.states), None if self.pooled is None else np.zeros_like(self.pooled))


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
        self._name = path.name
        with _refused(f"{path.name} is not a tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            self._tokenizer.enable_truncation(max_length)
            self._tokenizer.enable_padding(length=max_length, pad_id=pad_id)

    def __call__(self, prompts: Sequence[str]) -> NDArray[Any]:
        """``prompts`` (B of them) → token ids [B, L] int64; ``BundleError`` if the file cannot encode them."""
        with _refused(f"{self._name} cannot encode a prompt"):
            encoded = self._tokenizer.encode_batch(list(prompts))
        return np.array([encoding.ids for encoding in encoded], dtype=np.int64)

    def cut(self, prompt: str) -> Cut | None:
        """What ``prompt`` loses to the length; ``None`` if nothing. ``BundleError`` as when it is called."""
        with _refused(f"{self._name} cannot encode a prompt"):
            encoded = self._tokenizer.encode(prompt)
        return cut_off(prompt, encoded)


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """``BundleError`` for what the library raises of a file it does not understand.

    That is a bare ``Exception``, or where its code gave up (a Rust panic) something that is no ``Exception``.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise BundleError(f"{what}: {error}", hint=GET_AGAIN) from error
