"""Seeded random weights under which networks of any size stay finite, and a UNet answers as a denoiser does.

Every tensor is drawn by itself from its own name, so that the same network gets the same numbers whatever the order,
the precision or the shards it is written in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtu_compile.core.atomic import atomic_file
from mtu_compile.model.experts import TaskNorm

#: Mean square of SiLU of a standard normal number; a layer after it makes up for the loss.
_SILU = 0.356

#: Of the UNet's answer, what is its own invention; the rest is the noisy latent, as it nearly is for a trained one.
_OWN = 0.3

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}


@dataclass(frozen=True)
class Weight:
    """A tensor that is not there yet.

    Attributes:
        name: as the file has it.
        shape, dtype: of the tensor.
        draw: makes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    draw: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


def random_weights(network: nn.Module, seed: str, dtype: torch.dtype) -> list[Weight]:
    """What a network on the meta device would be filled with.

    Args:
        network: its parameters give names and shapes.
        seed: of the numbers, with each tensor's name.
        dtype: of the tensors.
    """
    return [
        Weight(name, tuple(one.shape), dtype, _drawn(network, module, name, tuple(one.shape), seed, dtype))
        for path, module in network.named_modules()
        for key, one in module.named_parameters(recurse=False)
        for name in (f"{path}.{key}" if path else key,)
    ]


def _drawn(
    network: nn.Module, module: nn.Module, name: str, shape: tuple[int, ...], seed: str, dtype: torch.dtype
) -> Callable[[], Tensor]:
    def draw() -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        values = torch.randn(shape, generator=generator)
        _scale(module, name, values)
        _shape_the_answer(network, name, values)
        return values.to(dtype)

    return draw


def _scale(module: nn.Module, name: str, values: Tensor) -> None:
    """Numbers of unit variance go in, and come out of every layer as large."""
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | TaskNorm):
        values.mul_(0.1)
        if name.endswith("weight"):
            values.add_(1.0)
    elif name.endswith("bias"):
        values.mul_(0.05)
    elif isinstance(module, nn.Embedding):
        # CLIP's own embeddings are small beside what its layers add.
        values.mul_(1.0 if "task" in name else 0.02)
    elif values.dim() > 1:
        values.mul_(1 / math.sqrt(values[0].numel()))


def _shape_the_answer(network: nn.Module, name: str, values: Tensor) -> None:
    """Let a UNet carry the noisy latent through to its output, and an autoencoder give latents of the usual size.

    Two channels carry each of the latent's, one of them negated, from the first convolution over the last skip
    connection to the last convolution, which finds it again as SiLU(x) - SiLU(-x) = x.
    """
    config: Any = getattr(network, "config", None)
    if "quant_conv" in name and "post" not in name and name.endswith("weight"):
        means, spread = values[: len(values) // 2], values[len(values) // 2 :]
        means.mul_(1 / (config.get("scaling_factor", 0.18215) * math.sqrt(_SILU)))
        spread.mul_(0.5)
    if name == "decoder.conv_out.weight":
        values.mul_(0.5 / math.sqrt(_SILU))
    if not hasattr(config, "cross_attention_dim"):
        return
    latent = int(config.in_channels)
    carrying = 2 * latent
    blocks, layers = len(config.block_out_channels) - 1, int(config.layers_per_block)
    last = f"up_blocks.{blocks}.resnets.{layers}"
    middle = tuple(side // 2 for side in values.shape[2:])
    if ("conv_in." in name or name.startswith("task_conv_in")) and name.endswith("weight"):
        values[:carrying] = 0
        for channel in range(latent):
            values[(channel, channel, *middle)] = 1
            values[(latent + channel, channel, *middle)] = -1
    elif name == f"{last}.conv_shortcut.weight":
        values[:carrying] = 0
        first = values.shape[1] - int(config.block_out_channels[0])
        for channel in range(carrying):
            values[(channel, first + channel, *middle)] = 1
    elif name in (f"{last}.conv2.weight", f"up_blocks.{blocks}.attentions.{layers}.proj_out.weight"):
        values[:carrying] *= 0.2
    elif name == "conv_out.weight":
        values.mul_(_OWN / math.sqrt(_SILU))
        for channel in range(latent):
            values[(channel, channel, *middle)] = 1
            values[(channel, latent + channel, *middle)] = -1


def write_safetensors(path: Path, weights: Sequence[Weight]) -> None:
    """Write ``weights`` to a safetensors file, one tensor in memory at a time."""
    places: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for one in weights:
        places[one.name] = {
            "dtype": _NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [end, end + one.nbytes],
        }
        end += one.nbytes
    header = json.dumps(places, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for one in weights:
            file.write(memoryview(one.draw().contiguous().numpy()).cast("B"))


def write_component(
    folder: Path, stem: str, weights: Sequence[Weight], *, variant: str | None = None, shard_bytes: int | None = None
) -> None:
    """Write the weights of one component, named as diffusers and transformers do.

    Args:
        folder: exists.
        stem: ``"diffusion_pytorch_model"`` or ``"model"``.
        weights: at least one.
        variant: part of the names (``"fp16"``).
        shard_bytes: more than this goes to shards with an index.
    """
    dot = f".{variant}" if variant else ""
    total = sum(one.nbytes for one in weights)
    if shard_bytes is None or total <= shard_bytes:
        write_safetensors(folder / f"{stem}{dot}.safetensors", weights)
        return
    shards = list(_shards(weights, shard_bytes))
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}{dot}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard)
        places.update((one.name, name) for one in shard)
    index: Mapping[str, Any] = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{stem}.safetensors.index{dot}.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(weights: Sequence[Weight], most: int) -> Iterator[list[Weight]]:
    shard: list[Weight] = []
    for one in weights:
        if shard and sum(other.nbytes for other in shard) + one.nbytes > most:
            yield shard
            shard = []
        shard.append(one)
    yield shard
