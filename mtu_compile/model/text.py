"""Prompts to what a UNet takes of them: the text encoders of a pipeline, whatever its family, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtu_compile.core.families import Family, TextBranch


@dataclass(frozen=True)
class Encoded:
    """Prompts as the UNet takes them.

    Attributes:
        states: [B, L, D], what it attends to.
        pooled: [B, P], its ``text_embeds``; ``None`` in families without.
    """

    states: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, rows: Any) -> Encoded:
        return Encoded(self.states[rows], None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of one pipeline.

    Attributes:
        family: says what is taken of each.
        tokenizers, encoders: in the order of ``family.texts``.
        zeros_for_empty: an empty negative prompt is all zeros instead of what the encoders make of it.
    """

    family: Family
    tokenizers: Sequence[Any]
    encoders: Sequence[Any]
    zeros_for_empty: bool = False

    def branches(self) -> Iterator[tuple[TextBranch, Any]]:
        """Each branch of the family with its text encoder."""
        return zip(self.family.texts, self.encoders, strict=True)

    @property
    def width(self) -> int:
        """D: all hidden states side by side."""
        return sum(int(encoder.config.hidden_size) for encoder in self.encoders)

    @property
    def pooled_width(self) -> int:
        """P; 0 in families without."""
        return sum(int(encoder.config.projection_dim) for branch, encoder in self.branches() if branch.pooled)

    @property
    def length(self) -> int:
        """L: tokens a prompt is padded or cut to."""
        return int(self.tokenizers[0].model_max_length)

    def encode(self, prompts: Sequence[str], batch: int = 64) -> Encoded:
        """Prompts, padded or cut to the tokenizers' length."""
        parts = [self._encode(prompts[start : start + batch]) for start in range(0, len(prompts), batch)]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Encoded(torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None)

    def encode_negative(self, prompt: str) -> Encoded:
        """[1, …] of what takes the prompt's place in guidance: a negative prompt, or nothing."""
        encoded = self.encode([prompt])
        if prompt or not self.zeros_for_empty:
            return encoded
        pooled = None if encoded.pooled is None else torch.zeros_like(encoded.pooled)
        return Encoded(torch.zeros_like(encoded.states), pooled)

    def tokens(self, prompts: Sequence[str]) -> list[Tensor]:
        """For each text encoder the ids [B, L] that it reads."""
        return [
            tokenizer(
                list(prompts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]

    def _encode(self, prompts: Sequence[str]) -> Encoded:
        states, pooled = [], None
        for (branch, encoder), ids in zip(self.branches(), self.tokens(prompts), strict=True):
            last = branch.states == "last"
            output = encoder(ids.to(encoder.device), output_hidden_states=not last)
            states.append(output.last_hidden_state if last else output.hidden_states[-2])
            if branch.pooled:
                pooled = output.text_embeds
        return Encoded(torch.cat(states, dim=-1), pooled)
