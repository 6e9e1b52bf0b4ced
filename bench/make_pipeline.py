"""Pipeline folders of the published families' size and form, filled with random numbers, for measurements.

    python -m bench.make_pipeline sd15 DIR
    python -m bench.make_pipeline sdxl DIR --variant fp16 --sharded
    python -m bench.make_pipeline sd21 DIR --plain          the pretrained pipeline, to be upcycled

Configs, scheduler, tokenizer form, file names and the entries beside them (safety checker) are the published ones; the
UNet is multi-task, with the paper's four tasks, unless --plain. A gigabyte of memory is enough for any of them. What is
not as published: weights are random, the vocabulary has CLIP's size and form but other words, and components that no
picture is made with (the safety checker) have no weights.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from itertools import chain, islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from torch import nn

from bench.families import FAMILIES, Config, Family, TextEncoder
from bench.make_samples import write_samples
from bench.random_weights import Weight, random_weights, write_component
from mtu_compile.core.atomic import staging
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.model.folder import INDEX, MODELS
from mtu_compile.model.networks import CLASSES
from mtu_compile.model.unet import MTUUNet2DConditionModel

#: What --sharded divides weights into: re-uploads of a network this large are cut into two to five gigabytes each.
SHARD_BYTES = 2_000_000_000

_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def write_pipeline(
    family: Family,
    out: Path,
    *,
    variant: str | None = None,
    shard_bytes: int | None = None,
    plain: bool = False,
    seed: int = 0,
    force: bool = False,
    picture: int = 512,
) -> Path:
    """Write a pipeline folder, whole or not at all.

    Args:
        family: what it is to look like.
        out: the folder.
        variant: ``"fp16"`` for weights in half precision alone, named so.
        shard_bytes: a UNet larger than this is written in shards; the others are published whole.
        plain: leave the UNet as it was published, without tasks.
        seed: of the weights.
        force: replace a pipeline folder that is there.
        picture: side of the pictures in ``samples``, in pixels.
    """
    dtype = torch.float16 if variant == "fp16" else torch.float32
    kind = "UNet2DConditionModel" if plain else "MTUUNet2DConditionModel"
    unet = family.unet if plain else {**family.unet, **_multi_task(family)}
    with staging(out, replace=force, marker=INDEX) as folder:
        weights = random_weights(_network(kind, unet), f"{seed}/unet", dtype)
        _write_json(folder / "unet" / "config.json", unet)
        write_component(folder / "unet", MODELS["unet"], weights, variant=variant, shard_bytes=shard_bytes)
        weights = random_weights(_network("AutoencoderKL", family.vae), f"{seed}/vae", dtype)
        if family.old_attention:
            weights = [Weight(_in_old_style(one.name), one.shape, one.dtype, one.draw) for one in weights]
        _write_json(folder / "vae" / "config.json", family.vae)
        write_component(folder / "vae", MODELS["vae"], weights, variant=variant)
        for name, encoder in family.text_encoders.items():
            _write_text_encoder(folder / name, encoder, f"{seed}/{name}", dtype, variant)
            tokenizer = folder / name.replace("text_encoder", "tokenizer")
            write_tokenizer(tokenizer, encoder.pad, int(encoder.config["vocab_size"]), _length(encoder))
        for path, data in {"scheduler/scheduler_config.json": family.scheduler, **family.extras}.items():
            _write_json(folder / path, data)
        if not plain:
            write_samples(folder / "samples", picture)
        _write_json(folder / INDEX, _index(family, kind))
    return out


def _multi_task(family: Family) -> Config:
    return {
        "_class_name": "MTUUNet2DConditionModel",
        "tasks": [task.to_json() for task in PAPER_TASKS],
        "num_experts": family.experts,
        "d_task": 768,
        "router_width": 768,
        "norm_per_expert": False,
        "top_k": None,
    }


def _index(family: Family, unet: str) -> dict[str, Any]:
    diffusers = {"scheduler": family.scheduler["_class_name"], "vae": "AutoencoderKL", "unet": unet}
    index: dict[str, Any] = {**family.index, **{name: ["diffusers", kind] for name, kind in diffusers.items()}}
    for name, encoder in family.text_encoders.items():
        index[name] = ["transformers", encoder.kind]
        index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    if unet == MTUUNet2DConditionModel.__name__:
        index["unet"] = [MTUUNet2DConditionModel.__module__, unet]
        index["_class_name"] = "MTUPipeline"
    return index


def _network(kind: str, config: Config) -> nn.Module:
    """A network without memory for its weights."""
    cls = CLASSES[kind]
    with torch.device("meta"):
        if cls.__module__.startswith("transformers"):
            from transformers import CLIPTextConfig

            return cls(CLIPTextConfig.from_dict(dict(config)))  # type: ignore[no-any-return]
        known = inspect.signature(cls.__init__).parameters
        return cls(**{key: value for key, value in config.items() if key in known})  # type: ignore[no-any-return]


def _in_old_style(name: str) -> str:
    for new, old in _OLD_NAMES.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def _write_text_encoder(folder: Path, encoder: TextEncoder, seed: str, dtype: torch.dtype, variant: str | None) -> None:
    """With the names of transformers before 5, in which the published files are."""
    _write_json(folder / "config.json", encoder.config)
    weights = []
    for one in random_weights(_network(encoder.kind, encoder.config), seed, dtype):
        inside = one.name.removeprefix("text_model.")
        name = inside if inside.startswith("text_projection") else f"text_model.{inside}"
        weights.append(Weight(name, one.shape, one.dtype, one.draw))
    if encoder.position_ids:
        length = _length(encoder)
        ids = Weight("text_model.embeddings.position_ids", (1, length), torch.int64, lambda: torch.arange(length)[None])
        weights.append(ids)
    write_component(folder, MODELS["text_encoder"], weights, variant=variant)


def _length(encoder: TextEncoder) -> int:
    return int(encoder.config["max_position_embeddings"])


def write_tokenizer(folder: Path, pad: str, size: int, length: int) -> None:
    """A byte-pair tokenizer in CLIP's form: ``vocab.json``, ``merges.txt`` and what says which tokens are special.

    Args:
        folder: is made.
        pad: the padding token.
        size: of the vocabulary, with CLIP's 512 bytes and two special tokens.
        length: tokens of a prompt.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = list(islice(_merges(), size - 2 * len(letters) - 2))
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(left + right for left, right in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    _write_json(folder / "vocab.json", {word: number for number, word in enumerate(words)}, indent=None)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shape = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    start, end = ({"content": word, **shape} for word in words[-2:])
    special = {"bos_token": start, "eos_token": end, "unk_token": end}
    _write_json(folder / "special_tokens_map.json", {**special, "pad_token": pad})
    config = {
        "add_prefix_space": False,
        **{key: {"__type": "AddedToken", **token} for key, token in special.items()},
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": pad if pad != "!" else "<|endoftext|>",
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", config)


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs of letters, then three and four of them, inside words and at their ends; no pair twice."""
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    ends = ("", "</w>")
    return chain(
        ((one[0], one[1] + end) for end in ends for one in pairs),
        ((one, letter + end) for end in ends for one in pairs for letter in ascii_lowercase),
        ((one, other) for one in pairs for other in pairs),
    )


def _write_json(path: Path, data: Config, indent: int | None = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=list(FAMILIES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", choices=["fp16"])
    parser.add_argument("--sharded", action="store_true")
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    shard_bytes = SHARD_BYTES if args.sharded else None
    write_pipeline(
        FAMILIES[args.family],
        args.out,
        variant=args.variant,
        shard_bytes=shard_bytes,
        plain=args.plain,
        seed=args.seed,
        force=args.force,
    )


if __name__ == "__main__":
    main()
