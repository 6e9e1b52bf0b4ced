"""The networks of one bundle: opened when they are first needed, held against the manifest, and run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mtu_compile import bundle
from mtu_compile.bundle import EngineRef, Manifest, TaskEntry, TextPart
from mtu_compile.core import vendors
from mtu_compile.core.errors import BundleError
from mtu_compile.core.families import FAMILIES, TEXT_EMBEDS, TIME_IDS
from mtu_compile.runtime import built, guidance, images
from mtu_compile.runtime.batches import batch_of
from mtu_compile.runtime.engine import Engine, TensorSpec, open_engine
from mtu_compile.runtime.finite import Network, advice, require_finite
from mtu_compile.runtime.step_cache import DEEP, without_deep_feature
from mtu_compile.runtime.task_engine import TASK_INPUT, TaskEngine
from mtu_compile.runtime.text import Embedding, Tokenizer

Array = NDArray[Any]

#: Opens a network of the bundle in another way than the bundle says.
Opener = Callable[[EngineRef], Engine]


#: Prompts of which is remembered what the text encoders make of them, the empty one of guidance among them: at most
#: 0.6 MB each (SDXL).
PROMPTS = 16

#: Of the inputs that families add; ``None`` for any.
_WIDTHS = {TEXT_EMBEDS: None, TIME_IDS: 6}


class Networks:
    """The networks of one bundle.

    Attributes:
        engines: those that are open, by path of their graph.
    """

    def __init__(self, root: Path, manifest: Manifest, opener: Opener | None = None) -> None:
        self._root, self._manifest = root, manifest
        self._opener = opener or self._open_here
        self.engines: dict[str, Engine] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        self._looked = False
        self._kept: Path | None = None
        self._remembered = lru_cache(PROMPTS)(self._embed)

    def open(self, ref: EngineRef) -> Engine:
        """A network; opened and kept."""
        engine = self.engines.get(ref.path)
        if engine is None:
            engine = self._opener(ref)
            self.engines[ref.path] = engine
        return engine

    def close(self) -> None:
        """Free all engines; they are opened again when they are needed again."""
        for engine in self.engines.values():
            engine.close()
        self.engines.clear()
        self._remembered.cache_clear()

    @property
    def shared(self) -> bool:
        """Whether all tasks share one UNet."""
        return self._manifest.routing == "shared"

    def unet(self, entry: TaskEntry) -> Engine:
        """The UNet of a task, as one that knows no other; ``BundleError`` if it is not what the manifest describes."""
        engine = without_deep_feature(self.open_unet(entry))
        return TaskEngine(engine, entry.task_id, self._channels(entry)) if self.shared else engine

    def open_unet(self, entry: TaskEntry) -> Engine:
        """The UNet that computes a task, and where it is shared all others too; ``BundleError`` as ``unet``."""
        engine, ref = self.open(entry.engine), entry.engine
        batch = None if self.shared else entry.task.unet_batch
        if self.shared:
            _expect(engine, ref, "sample", (None, None, *self._manifest.latent_size))
            _expect(engine, ref, TASK_INPUT, (batch_of(engine),))
            width, widest = engine.inputs["sample"].shape[1], max(map(self._channels, self._manifest.tasks.values()))
            if width is not None and width < widest:
                raise BundleError(f"{ref.path} takes {width} channels, and its manifest describes a task of {widest}")
        elif TASK_INPUT in engine.inputs:
            raise BundleError(f"{ref.path} has an input {TASK_INPUT!r}, and its manifest says that no tasks share it")
        else:
            _expect(engine, ref, "sample", (batch, self._channels(entry), *self._manifest.latent_size))
        if entry.task.guidance == "embedded":
            _expect(engine, ref, guidance.SCALE_INPUT, (batch, None))
        for name in FAMILIES[self._manifest.family].conditions:
            _expect(engine, ref, name, (batch, _WIDTHS[name]))
        return engine

    def open_shallow(self, entry: TaskEntry) -> Engine:
        """The shallow UNet of a task whose step cache has one; ``BundleError`` unless it takes what the whole gives."""
        assert entry.step_cache is not None
        ref, whole = entry.step_cache.engine, self.open_unet(entry)
        shallow = self.open(ref)
        given = whole.outputs.get(DEEP)
        if given is None:
            raise BundleError(f"{entry.engine.path} has no output {DEEP!r}, which {ref.path} takes")
        _expect(shallow, ref, DEEP, given.shape)
        if more := sorted(shallow.inputs.keys() - whole.inputs.keys() - {DEEP}):
            raise BundleError(f"{ref.path} takes {more[0]!r}, which {entry.engine.path} does not")
        for name in shallow.inputs.keys() - {DEEP}:
            _expect(shallow, ref, name, whole.inputs[name].shape)
        return shallow

    def _channels(self, entry: TaskEntry) -> int:
        """Of a task's noisy latent and its condition."""
        channels = self._manifest.latent_channels
        return channels + entry.task.condition_channels(channels)

    def encode_picture(self, pixels: Array) -> Array:
        """[1, 3, H, W] in [-1, 1] → [1, C, h, w], the mean of the posterior as a UNet latent."""
        ref = self._manifest.vae_encoder
        if ref is None:
            raise BundleError("the bundle has no VAE encoder, which this task needs")
        engine = self.open(ref)
        _expect(engine, ref, "sample", pixels.shape)
        moments = engine({"sample": pixels})["latent_parameters"]
        require_finite(moments, "vae_encoder", hint=advice(self._manifest, ref))
        return moments[:, : self._manifest.latent_channels] * np.float32(self._manifest.scaling_factor)

    def decode_picture(self, latents: Array) -> Image.Image:
        """[1, C, h, w], the final latent → the picture."""
        ref = self._manifest.vae_decoder
        engine = self.open(ref)
        _expect(engine, ref, "latent_sample", latents.shape)
        decoded = engine({"latent_sample": latents / np.float32(self._manifest.scaling_factor)})["sample"]
        return images.to_picture(require_finite(decoded, "vae_decoder", hint=advice(self._manifest, ref)))

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, the first if there are two; opened and kept."""
        return self._tokenizer_of(self._manifest.text)

    def _tokenizer_of(self, text: TextPart) -> Tokenizer:
        if text.tokenizer not in self._tokenizers:
            path = bundle.resolve(self._root, text.tokenizer)
            self._tokenizers[text.tokenizer] = Tokenizer(path, text.max_length, text.pad_id)
        return self._tokenizers[text.tokenizer]

    def encode_text(self, prompts: Sequence[str]) -> list[Embedding]:
        """One for each prompt; those of the last ``PROMPTS`` are remembered.

        A prompt goes through the encoders by itself, so that what comes of it does not depend on the others.
        """
        return [self._remembered(prompt) for prompt in prompts]

    def _embed(self, prompt: str) -> Embedding:
        branches = FAMILIES[self._manifest.family].texts
        parts = [
            self._encode(text, branch.encoder, prompt)
            for text, branch in zip(self._manifest.texts.values(), branches, strict=True)
        ]
        states = np.concatenate([one.states for one in parts], axis=-1)
        return Embedding(states, next((one.pooled for one in parts if one.pooled is not None), None))

    def _encode(self, text: TextPart, network: Network, prompt: str) -> Embedding:
        """What one text encoder makes of a prompt."""
        engine = self.open(text.engine)
        _expect(engine, text.engine, "input_ids", (None, text.max_length))
        for name in (text.states, text.pooled):
            if name is not None and name not in engine.outputs:
                raise BundleError(f"{text.engine.path} has no output {name!r}; it gives {', '.join(engine.outputs)}")
        spec, hint = engine.inputs["input_ids"], advice(self._manifest, text.engine)
        tokens = self._tokenizer_of(text)([prompt]).astype(spec.dtype, copy=False)
        answers = engine({"input_ids": np.repeat(tokens, spec.shape[0] or 1, axis=0)})
        states = require_finite(answers[text.states][0], network, hint=hint)
        pooled = None if text.pooled is None else require_finite(answers[text.pooled][0], network, hint=hint)
        return Embedding(states, pooled)

    def _open_here(self, ref: EngineRef) -> Engine:
        """With what was built from the graph on this machine, else on the machine the bundle comes from."""
        prebuilt = built.find(self._root, self._manifest, ref) if ref.kind in vendors.builders() else None
        if prebuilt is None and ref.prebuilt is not None:
            prebuilt = bundle.resolve(self._root, ref.prebuilt)
        graph = bundle.resolve(self._root, ref.path)
        weights = None if ref.weights is None else bundle.resolve(self._root, ref.weights)
        return open_engine(ref.kind, graph, ref.config, prebuilt, cache=self._cache(), weights=weights)

    def _cache(self) -> Path | None:
        if not self._looked:  # once, before the first network is opened: what comes later is its own runtime's
            self._kept, self._looked = built.cache(self._root), True
        return self._kept


def _expect(engine: Engine, ref: EngineRef, name: str, shape: Sequence[int | None]) -> None:
    """``BundleError`` unless ``engine`` has an input ``name`` that takes ``shape``."""
    spec: TensorSpec | None = engine.inputs.get(name)
    if spec is None:
        raise BundleError(f"{ref.path} has no input {name!r}; it takes {', '.join(engine.inputs)}")
    fits = len(spec.shape) == len(shape) and all(
        None in (have, want) or have == want for have, want in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        raise BundleError(f"{ref.path} takes {name!r} as {spec}, and its manifest describes {list(shape)}")
