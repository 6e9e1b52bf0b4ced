"""Prompts on the GPU: the token ids of every way a row may be prompted."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from examples.emoji import data
from examples.emoji.captions import forms
from examples.emoji.train_base import LENGTH

CAPTION_SLOTS = 8
#: Of an inpainting prompt's slots, how many are plain, another form, or one with words lost or unknown.
PLAIN, OTHER, DAMAGED = 3, 3, 6
#: What words nobody knows are made of.
SYLLABLES = (
    "ba",
    "dor",
    "fi",
    "gul",
    "hes",
    "jam",
    "ko",
    "lun",
    "mer",
    "nix",
    "pol",
    "qua",
    "rit",
    "sol",
    "tav",
    "wem",
)


class Prompts:
    """Token ids of every way a row may be prompted; the plain way is drawn most."""

    def __init__(self, rows: Sequence[Sequence[str]], tokenizer: CLIPTokenizer, device: torch.device) -> None:
        texts = {text: i for i, text in enumerate(dict.fromkeys(text for row in rows for text in row))}
        self.table = token_ids(tokenizer, list(texts)).to(device)
        slots = []
        for row in rows:
            rest = [row[i % len(row)] for i in range(CAPTION_SLOTS - 3)]
            slots.append([texts[text] for text in (row[0], row[0], row[0], *rest)])
        self.slots = torch.tensor(slots, device=device)

    def draw(self, rows: Tensor) -> Tensor:
        """Ids [b, L] for the rows [b]."""
        slot = torch.randint(CAPTION_SLOTS, rows.shape, device=rows.device)
        return self.table[self.slots[rows, slot]]


def token_ids(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    tokens = tokenizer(list(texts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    ids: Tensor = tokens.input_ids
    return ids


def captions_of(emoji: Sequence[data.Emoji]) -> list[list[str]]:
    toned = {e.base for e in emoji if e.tone}
    return [forms(e, toned=e.base in toned) for e in emoji]


def damaged(caption: str, rng: random.Random) -> str:
    """A caption that has lost some of its words, or has others nobody knows in their place."""

    def unknown() -> str:
        return "".join(rng.choices(SYLLABLES, k=rng.randint(2, 3)))

    words = caption.split()
    if rng.random() < 0.5:
        return " ".join(word for word in words if rng.random() < 0.5)
    return " ".join(unknown() if rng.random() < 0.5 else word for word in words)


class DamagedPrompts:
    """Token ids of every way a row may be described, the words of half of them damaged."""

    def __init__(self, rows: Sequence[Sequence[str]], tokenizer: CLIPTokenizer, device: torch.device) -> None:
        rng = random.Random(0)
        texts: dict[str, int] = {}
        slots = []
        for row in rows:
            chosen = [row[0]] * PLAIN + [rng.choice(row) for _ in range(OTHER)]
            chosen += [damaged(rng.choice(row), rng) for _ in range(DAMAGED)]
            slots.append([texts.setdefault(text, len(texts)) for text in chosen])
        self.table = token_ids(tokenizer, list(texts)).to(device)
        self.slots = torch.tensor(slots, device=device)

    def draw(self, rows: Tensor) -> Tensor:
        """Ids [b, L] for the rows [b]."""
        slot = torch.randint(self.slots.shape[1], rows.shape, device=rows.device)
        return self.table[self.slots[rows, slot]]
