"""Tokenizers in the form that Stable Diffusion was published with."""

from __future__ import annotations

import json
from pathlib import Path


def write_slow_tokenizer(folder: Path, pad: str) -> None:
    """Turn ``tokenizer.json`` into ``vocab.json``, ``merges.txt`` and ``special_tokens_map.json``, as was usual."""
    path = folder / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    path.unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = ({"content": one, **token} for one in ("<|startoftext|>", "<|endoftext|>"))
    special = {"bos_token": start, "eos_token": end, "unk_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad}))
    config = {key: {"__type": "AddedToken", **value} for key, value in special.items()}
    limit = json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]
    config |= {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": limit}
    config |= {"pad_token": "<|endoftext|>", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
