"""Training data: rows of image folders to latents, conditions and text embeddings.

A ``Source`` is an endless shuffled sequence of one task's examples that can be entered at any position, so that a
resumed run reads on where it stopped. Finite sets that fit are encoded once; then a step runs nothing but the UNet.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import InputError
from mtu_compile.core.fit import Fit
from mtu_compile.core.masks import random_mask
from mtu_compile.core.rows import CHECK_SPLIT, METADATA, Row, parse_row, read_rows
from mtu_compile.core.tasks import Task
from mtu_compile.model import encode
from mtu_compile.model.text import Encoded, TextEncoders
from mtu_compile.runtime import images
from mtu_compile.runtime.masks import read_mask

SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class Batch:
    """Encoded examples of one task.

    Attributes:
        latents: [b, C, h, w], scaled latents of the wanted pictures.
        condition: [b, c, h, w], the task's condition channels (c may be 0).
        text: [b, L, D], embeddings of the prompts.
        pooled: [b, P], their pooled embeddings (P may be 0).
    """

    latents: Tensor
    condition: Tensor
    text: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Encoder:
    """The frozen networks that turn rows into tensors.

    Attributes:
        height, width: of the pictures, in pixels.
        fit: what becomes of pictures of other proportions.
        mask_variants: random masks made for each picture of a task with a mask condition.
        seed: of the random masks.
    """

    vae: Any
    texts: TextEncoders
    height: int
    width: int
    mask_variants: int
    seed: int
    fit: Fit = "crop"

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def latents(self, pixels: Tensor) -> Tensor:
        return encode.encode_pixels(self.vae, pixels).cpu()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def prompts(self, prompts: Sequence[str]) -> Encoded:
        return _kept(self.texts.encode(prompts))

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def no_prompt(self) -> Encoded:
        """[1, …] of what takes the prompt's place in guidance."""
        return _kept(self.texts.encode_negative(""))

    def picture(self, path: Path, downscale: int | None = None) -> Tensor:
        """[3, H, W] in [-1, 1]; with ``downscale`` the picture made that much smaller and brought back up."""
        picture = images.open_image(path)
        if downscale:
            picture = encode.degrade(picture, self.height, self.width, downscale, self.fit)
        return encode.to_pixels(picture, self.height, self.width, self.fit)[0]

    def mask(self, task: Task, row: Row, variant: int) -> Tensor:
        """[1, H, W]: the row's own mask, or the ``variant``-th random one of its picture."""
        if row.mask is not None:
            selected, _ = read_mask(images.open_mask(row.mask))
            over = images.open_image(source_of(task, row)[0]).size
            return encode.to_mask(selected, self.height, self.width, self.fit, over=over)[0]
        name = hashlib.sha256(row.target.name.encode() if row.target else b"").digest()[:8]
        rng = np.random.default_rng([self.seed, int.from_bytes(name, "big"), variant])
        return torch.from_numpy(random_mask(rng, self.height, self.width)[None] > 0).float()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def conditions(self, task: Task, rows: Sequence[Row], variants: Sequence[int]) -> Tensor:
        """Condition channels [n, c, h, w] of ``rows``, each with the mask variant of the same index."""
        pixels = torch.stack([self.picture(*source_of(task, row)) for row in rows])
        mask = None
        if {"mask", "masked_image"} & set(task.condition):
            mask = torch.stack([self.mask(task, row, variant) for row, variant in zip(rows, variants, strict=True)])
        pieces = encode.condition_pieces(task, self.vae, pixels.to(self.vae.device), _to(mask, self.vae.device))
        assert pieces is not None
        return pieces.cpu()


def _kept(encoded: Encoded) -> Encoded:
    """In float32 and main memory, pooled embeddings of width 0 where there are none."""
    states, pooled = encoded.states.float().cpu(), encoded.pooled
    return Encoded(states, states.new_zeros(len(states), 0) if pooled is None else pooled.float().cpu())


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def source_of(task: Task, row: Row) -> tuple[Path, int | None]:
    """The picture a row's condition is made from, and how much smaller it has to be made first."""
    if "image" in task.condition and row.image is not None:
        return row.image, None
    assert row.target is not None
    return row.target, task.downscale


class Source(Protocol):
    """Examples of one task as an endless shuffled sequence."""

    def take(self, position: int, count: int, rng: np.random.Generator) -> Batch:
        """The examples ``position … position + count - 1``; ``rng`` draws what is random about them."""
        ...


def training_rows(folder: Path, task: Task) -> tuple[Row, ...]:
    """Rows of ``folder`` that ``task`` can be trained on, without those kept for checks.

    Raises:
        InputError: a row lacks a picture that the task needs.
    """
    rows = tuple(row for row in read_rows(folder) if row.split != CHECK_SPLIT)
    if not rows:
        raise InputError(f"{folder / METADATA} has only rows of the split {CHECK_SPLIT!r}")
    for row in rows:
        check_row(task, row)
    return rows


def check_row(task: Task, row: Row) -> None:
    """``InputError`` if ``row`` lacks what training ``task`` needs."""
    if row.target is None:
        raise InputError(f"{row.place}: training needs file_name, the wanted picture")
    if "image" in task.condition and task.downscale is None and row.image is None:
        raise InputError(f"{row.place}: task {task.name!r} needs image_file_name, the source picture")


class Shuffled:
    """Positions of an endless sequence → indices into a finite set, reshuffled every epoch."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(size)
        )

    def __call__(self, position: int, count: int) -> NDArray[np.int64]:
        positions = range(position, position + count)
        return np.array([self._epoch(p // self._size)[p % self._size] for p in positions], np.int64)


class CachedSource:
    """A finite set encoded once. Latents are kept once per distinct picture, embeddings once per distinct prompt."""

    def __init__(self, tensors: dict[str, Tensor], seed: int) -> None:
        self._tensors = tensors
        self._order = Shuffled(len(tensors["target"]), seed)

    def take(self, position: int, count: int, rng: np.random.Generator) -> Batch:
        t = self._tensors
        rows = torch.from_numpy(self._order(position, count))
        variants = torch.from_numpy(rng.integers(t["conditions"].shape[1], size=count))
        return Batch(
            latents=t["latents"][t["target"][rows]],
            condition=t["conditions"][t["condition"][rows], variants],
            text=t["prompts"][t["prompt"][rows]],
            pooled=t["pooled"][t["prompt"][rows]],
        )


class DirectSource:
    """A finite set too large to keep encoded: pictures are read and encoded at every step."""

    def __init__(self, task: Task, rows: Sequence[Row], encoder: Encoder, seed: int) -> None:
        self._task, self._rows, self._encoder = task, rows, encoder
        self._order = Shuffled(len(rows), seed)

    def take(self, position: int, count: int, rng: np.random.Generator) -> Batch:
        return encode_rows(self._task, [self._rows[i] for i in self._order(position, count)], self._encoder, rng)


class StreamedSource:
    """A set of any size, read by ``datasets`` line by line and shuffled in a buffer; nothing is kept."""

    def __init__(self, task: Task, folder: Path, encoder: Encoder, seed: int) -> None:
        self._task, self._folder, self._encoder, self._seed = task, folder, encoder, seed
        self._rows, self._position = self._endless(), 0

    def _endless(self) -> Iterator[Row]:
        from datasets import load_dataset

        path = self._folder / METADATA
        if not path.is_file():
            raise InputError(f"there is no {path}", hint="one JSON object a line, with file_name and prompt")
        lines = load_dataset("json", data_files=[os.fspath(path)], split="train", streaming=True)
        lines = lines.shuffle(seed=self._seed, buffer_size=SHUFFLE_BUFFER)
        for epoch in range(2**31):
            lines.set_epoch(epoch)
            empty = True
            for data in lines:
                row = parse_row(self._folder, os.fspath(path), data)
                if row.split != CHECK_SPLIT:
                    check_row(self._task, row)
                    empty = False
                    yield row
            if empty:
                raise InputError(f"{path} has no rows to train on")

    def take(self, position: int, count: int, rng: np.random.Generator) -> Batch:
        # Rows before the position (another process's, or those of a run that is resumed) are read, not decoded.
        if position < self._position:
            self._rows, self._position = self._endless(), 0
        while self._position < position:
            next(self._rows)
            self._position += 1
        rows = [next(self._rows) for _ in range(count)]
        self._position += count
        return encode_rows(self._task, rows, self._encoder, rng)


def encode_rows(task: Task, rows: Sequence[Row], encoder: Encoder, rng: np.random.Generator) -> Batch:
    """Read and encode ``rows`` now."""
    latents = encoder.latents(torch.stack([encoder.picture(row.target) for row in rows if row.target]))
    condition = latents[:, :0]
    if task.condition:
        condition = encoder.conditions(task, rows, [int(v) for v in rng.integers(2**31, size=len(rows))])
    text = encoder.prompts([row.prompt for row in rows])
    assert text.pooled is not None
    return Batch(latents, condition, text.states, text.pooled)


def encode_set(task: Task, rows: Sequence[Row], encoder: Encoder, advance: Callable[[int], None]) -> dict[str, Tensor]:
    """Encode a finite set: tensors for ``CachedSource``. ``advance`` is called with the pictures done."""
    targets = list(dict.fromkeys(row.target for row in rows if row.target))
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    by_source = {_condition_key(task, row): row for row in rows}
    sources = list(by_source)
    latents = []
    for chunk in _chunks(targets, 64):
        latents.append(encoder.latents(torch.stack([encoder.picture(path) for path in chunk])))
        advance(len(chunk))
    text = encoder.prompts(prompts)
    assert text.pooled is not None
    tensors = {
        "latents": torch.cat(latents),
        "prompts": text.states,
        "pooled": text.pooled,
        "target": _indices(targets, [row.target for row in rows]),
        "prompt": _indices(prompts, [row.prompt for row in rows]),
        "condition": _indices(sources, [_condition_key(task, row) for row in rows]),
    }
    if not task.condition:
        tensors["condition"] = torch.zeros(len(rows), dtype=torch.int64)
        tensors["conditions"] = tensors["latents"][:1, None, :0].clone()
        return tensors
    variants = variants_of(task, rows, encoder)
    encoded = []
    for chunk in _chunks(sources, max(1, 64 // variants)):
        repeated = [by_source[key] for key in chunk for _ in range(variants)]
        pieces = encoder.conditions(task, repeated, list(range(variants)) * len(chunk))
        encoded.append(pieces.unflatten(0, (len(chunk), variants)))
        advance(len(repeated))
    tensors["conditions"] = torch.cat(encoded)
    return tensors


def variants_of(task: Task, rows: Sequence[Row], encoder: Encoder) -> int:
    """Condition variants kept for each picture: several where masks are random, else one."""
    masked = {"mask", "masked_image"} & set(task.condition)
    return encoder.mask_variants if masked and any(row.mask is None for row in rows) else 1


def encoded_pictures(task: Task, rows: Sequence[Row], encoder: Encoder) -> int:
    """How many pictures ``encode_set`` runs through the autoencoder."""
    targets = len({row.target for row in rows})
    sources = len({_condition_key(task, row) for row in rows}) if task.condition else 0
    return targets + sources * variants_of(task, rows, encoder)


def _condition_key(task: Task, row: Row) -> tuple[Any, ...]:
    return (*source_of(task, row), row.mask) if task.condition else ()


def _indices(known: Sequence[Any], wanted: Sequence[Any]) -> Tensor:
    index = {key: i for i, key in enumerate(known)}
    return torch.tensor([index[key] for key in wanted], dtype=torch.int64)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def cache_key(task: Task, rows: Sequence[Row], encoder: Encoder, model: str) -> str:
    """Names the encoded set: it changes with the rows, their files, the model and the settings."""
    digest = hashlib.sha256(
        f"3 {model} {task} {encoder.height} {encoder.width} {encoder.fit} {encoder.seed}\n".encode()
    )
    digest.update(f"{variants_of(task, rows, encoder)}\n".encode())
    for row in rows:
        digest.update(f"{row.prompt!r}\n".encode())
        for path in (row.target, row.image, row.mask):
            stat = path.stat() if path else None
            digest.update(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()[:32]


def load_cache(path: Path) -> dict[str, Tensor] | None:
    """An encoded set from an earlier run; ``None`` where there is none, or a damaged one."""
    with suppress(OSError, SafetensorError):
        with safe_open(path, framework="pt"):
            pass
        return dict(load_file(path))
    return None


def save_cache(path: Path, tensors: dict[str, Tensor]) -> None:
    """Keep an encoded set for a later run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial)
