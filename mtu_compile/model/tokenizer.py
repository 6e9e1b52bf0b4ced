"""Tokenizers of pipeline folders: CLIP's, as ``tokenizer.json`` or as ``vocab.json`` and ``merges.txt``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from transformers import CLIPTokenizer

from mtu_compile.core.errors import ModelError, first_line
from mtu_compile.core.schema import Mismatch, Range, Rule, conform, read_json, show

CONFIG = "tokenizer_config.json"

_FETCH = "fetch the model again"

#: What has to hold of the config, beside the length. The runtime's tokenizer knows no other ways.
_KINDS: Mapping[str, Any] = {
    **{
        side: Annotated[str, Rule(lambda value: value == "right", '"right"')]
        for side in ("padding_side", "truncation_side")
    },
    "split_special_tokens": Annotated[bool | None, Rule(lambda on: not on, "false")],
    "tokenizer_class": Annotated[
        str, Rule(lambda name: name in ("CLIPTokenizer", "CLIPTokenizerFast"), '"CLIPTokenizer"')
    ],
}


def check_tokenizer(folder: Path, positions: int, vocabulary: int) -> None:
    """The files are there, and the config asks nothing that the runtime's tokenizer would not do.

    Args:
        folder: of the tokenizer.
        positions: ``max_position_embeddings`` of the text encoder that reads the tokens.
        vocabulary: its ``vocab_size``; it has no embedding for tokens past it.

    Raises:
        ModelError: naming file and key.
    """
    try:
        config = conform(Mapping[str, Any], read_json(folder / CONFIG, hint=_FETCH))
        for key, kind in _KINDS.items():
            if key in config:
                conform(kind, config[key], key)
    except Mismatch as mismatch:
        raise mismatch.at(folder / CONFIG, hint=_FETCH) from mismatch
    try:
        # Prompts are padded to it. Files without it stand for "of any length", which no text encoder takes.
        if "model_max_length" not in config:
            raise Mismatch("model_max_length", None, f"a whole number from 2 to {positions}")
        conform(Annotated[int, Range(2, positions)], config["model_max_length"], "model_max_length")
    except Mismatch as mismatch:
        hint = f"the text encoder has {positions} positions; Stable Diffusion's prompts have 77 tokens"
        raise mismatch.at(folder / CONFIG, hint=hint) from mismatch
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise ModelError(f"{folder / name} is missing, and so is tokenizer.json", hint=_FETCH)
    known = load_tokenizer(folder).get_vocab()
    last = max(known, key=known.__getitem__)
    if known[last] >= vocabulary:
        raise ModelError(
            f"{folder} has a token {show(last)} numbered {known[last]}, and the text encoder knows {vocabulary} tokens",
            hint="the tokenizer and the text encoder do not belong together; fetch the model again",
        )


def check_lengths(folders: Sequence[Path]) -> None:
    """``ModelError`` unless checked tokenizers have one length: their text encoders' states are joined by token."""
    lengths = {folder: read_json(folder / CONFIG)["model_max_length"] for folder in folders}
    (first, wanted), *others = lengths.items()
    for folder, length in others:
        if length != wanted:
            expected = f"{wanted}, as {first.name} has"
            raise Mismatch("model_max_length", show(length), expected).at(folder / CONFIG, hint=_FETCH)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in ``folder``; ``ModelError`` if its files are damaged or a special token is missing."""
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"{folder} is not a tokenizer: {first_line(error)}", hint=_FETCH) from error
    for name, number in special.items():
        if number is None:
            raise ModelError(f"{folder} has no {name}_token", hint=_FETCH)
    return tokenizer
