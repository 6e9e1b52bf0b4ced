"""What a bundle says about itself: frozen dataclasses and their form in ``manifest.json``."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from mtu_compile.bundle.accuracy import Accuracy, Limits
from mtu_compile.bundle.encode import encode
from mtu_compile.bundle.engine import EngineRef
from mtu_compile.bundle.kinds import (
    Channels,
    Count,
    Decibels,
    Factor,
    Length,
    Magnitude,
    Name,
    Positive,
    Routing,
    Scale,
    Sha256,
    Side,
    Steps,
    Text,
    TokenId,
)
from mtu_compile.bundle.provenance import BuildProvenance, TaskProvenance
from mtu_compile.bundle.scheduler_config import SchedulerConfig
from mtu_compile.bundle.step_cache import StepCache
from mtu_compile.bundle.upgrade import from_version_1
from mtu_compile.core.errors import BundleError
from mtu_compile.core.families import FAMILIES, FamilyName
from mtu_compile.core.fit import Fit
from mtu_compile.core.precision import Precision
from mtu_compile.core.schema import Mismatch, conform
from mtu_compile.core.tasks import Task

MANIFEST = "manifest.json"

#: Signature of the manifest, beside it; see ``bundle.signature``.
SIGNATURE = "signature.json"

#: Bytes; the largest manifests so far have some hundred kilobytes.
MOST_MANIFEST_BYTES = 16 << 20

#: Folder of engines that the machine the bundle lies on built from it; not part of what the manifest vouches for.
BUILT = "built"

#: What ``write`` writes.
SCHEMA_VERSION = 2

#: How manifests of earlier versions become one of this.
UPGRADES: Mapping[int, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {1: from_version_1}


@dataclass(frozen=True)
class Source:
    """The checkpoint the bundle was compiled from: its name, and the SHA-256 of its weights."""

    name: Text
    sha256: Sha256


@dataclass(frozen=True)
class TextPart:
    """Tokenizer (path of ``tokenizer.json``) and text encoder.

    Attributes:
        max_length: L, tokens a prompt is padded or cut to.
        pad_id: token id it is padded with.
        states: output [b, L, D] of the engine that UNets attend to.
        pooled: output [b, P] that UNets take as ``text_embeds``, or ``None``.
    """

    tokenizer: Text
    max_length: Length
    pad_id: TokenId
    engine: EngineRef
    states: Text = "last_hidden_state"
    pooled: Text | None = None


@dataclass(frozen=True)
class PassRecord:
    """One graph pass that ran: its id, whether it changed the graph, and in how many places."""

    id: Text
    changed: bool
    rewrites: Count


@dataclass(frozen=True)
class UserPassRecord:
    """One graph pass that the user brought.

    Attributes:
        id: ``user::<file>:<function>``.
        changed: whether it changed the graph.
        rewrites: nodes that are new or changed.
        sha256: of the file it was read from.
        tolerance: largest difference of an output that it declares, as a share of the output's largest value.
        error: that difference as it was measured.
    """

    id: Text
    changed: bool
    rewrites: Count
    sha256: Sha256
    tolerance: Magnitude
    error: Magnitude


@dataclass(frozen=True)
class TaskEntry:
    """One task of the bundle.

    Attributes:
        task: its description.
        task_id: its index in the source checkpoint.
        engine: its UNet.
        default_steps: denoising steps unless the user says otherwise.
        passes: what was done to its graph.
        user_passes: what passes of the user's own did to it, after those that specialise it.
        calibration: SHA-256 of the calibration set, or ``None`` if the engine is not calibrated.
        accuracy: what the comparison with the float original measured, and on what (``measured_with``), or ``None``
            with ``accuracy_reason``.
        accuracy_reason: why nothing was measured.
        thresholds: by metric, what the model asks of the task in this precision; ``None`` in a bundle without, which is
            held to the defaults of its precision.
        step_cache: how it does with fewer whole UNet calls; ``None`` where all are whole.
        reference: path of the float reference (safetensors), if the bundle carries one.
        provenance: how it was made.
    """

    task: Task
    task_id: Count
    engine: EngineRef
    default_steps: Steps
    passes: tuple[PassRecord, ...] = ()
    calibration: Sha256 | None = None
    accuracy: Accuracy | None = None
    accuracy_reason: Text | None = None
    reference: Text | None = None
    provenance: TaskProvenance = field(default_factory=TaskProvenance)
    user_passes: tuple[UserPassRecord, ...] = ()
    thresholds: Limits | None = None
    step_cache: StepCache | None = None


@dataclass(frozen=True)
class InstructionSetProof:
    """A bundle for CPUs, run at one instruction set.

    Attributes:
        level: in oneDNN's words (``"AVX512_CORE_VNNI"``).
        cpu: the CPU it ran on.
        imitated: the CPU has more, and stood in for a lesser one.
        calls: UNet calls of each task.
        worst_sqnr_db: by task, the least accurate of them against the float original, decibels.
        failures: every task that is not as it should be, in words; none is a proof.
    """

    level: Text
    cpu: Text
    imitated: bool
    calls: Positive
    worst_sqnr_db: Mapping[str, Decibels]
    failures: tuple[Text, ...] = ()

    def to_json(self) -> dict[str, Any]:
        encoded: dict[str, Any] = encode(self)
        return encoded

    @classmethod
    def from_json(cls, data: Any) -> InstructionSetProof:
        """The inverse of ``to_json``; ``Mismatch`` for anything else."""
        proof = conform(cls, data)
        assert isinstance(proof, cls)
        return proof


@dataclass(frozen=True)
class Manifest:
    """The whole of ``manifest.json``; all paths are relative to the bundle, with forward slashes.

    Attributes:
        tools: version of each tool that took part.
        source: the checkpoint.
        target: name of the target (``"cpu"``).
        precision: precision the engines run in (``"int8"``, ``"fp16"``, ``"bf16"``, ``"fp32"``, …).
        image_size: pixels, (height, width).
        latent_channels: channels of the noisy latent.
        vae_scale: pixels per latent cell.
        scaling_factor: what a VAE latent is multiplied by to become a UNet latent.
        text: tokenizer and text encoder.
        text_2: those of a family's second one, whose hidden states stand beside the first one's.
        family: which text encoders there are, and what UNets are told beside the text (``mtu_compile.core.families``).
        zeros_for_empty_prompt: an empty negative prompt is all zeros, instead of what the text encoders make of it.
        vae_encoder: picture → moments; ``None`` if no task of the bundle takes a picture.
        vae_decoder: latent → picture.
        scheduler: contents of the checkpoint's ``scheduler_config.json``.
        tasks: by name, in the order of the checkpoint.
        fit: what becomes of pictures of other proportions than ``image_size``, unless the user says otherwise; what the
            references were made with. A manifest that does not say stretches: that is what there was before there were
            others.
        routing: ``"static"`` where each task has a UNet of its own, which knows no other; ``"shared"`` where one UNet
            serves all tasks, whose input ``task`` takes the ``task_id`` of each sample.
        files: SHA-256 of every file of the bundle except the manifest; filled in by ``write``.
        provenance: how the bundle was made.
        instruction_sets: where a CPU runs the bundle, the instruction sets it was tried at.
    """

    tools: Mapping[str, Text]
    source: Source
    target: Name
    precision: Precision
    image_size: tuple[Side, Side]
    latent_channels: Channels
    vae_scale: Scale
    scaling_factor: Factor
    text: TextPart
    vae_encoder: EngineRef | None
    vae_decoder: EngineRef
    scheduler: SchedulerConfig
    tasks: Mapping[str, TaskEntry]
    fit: Fit = "stretch"
    routing: Routing = "static"
    files: Mapping[str, Sha256] = field(default_factory=dict)
    provenance: BuildProvenance = field(default_factory=BuildProvenance)
    instruction_sets: tuple[InstructionSetProof, ...] = ()
    family: FamilyName = "sd"
    text_2: TextPart | None = None
    zeros_for_empty_prompt: bool = False

    @property
    def texts(self) -> Mapping[str, TextPart]:
        """Its text encoders by the field they are in."""
        return {"text": self.text} | ({} if self.text_2 is None else {"text_2": self.text_2})

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent (height, width)."""
        return self.image_size[0] // self.vae_scale, self.image_size[1] // self.vae_scale

    def engines(self) -> Iterator[tuple[str, EngineRef]]:
        """(where it is said, network) of every network of the bundle; a UNet that all tasks share is ``"unet"``."""
        for where, text in self.texts.items():
            yield f"{where}.engine", text.engine
        if self.vae_encoder is not None:
            yield "vae_encoder", self.vae_encoder
        yield "vae_decoder", self.vae_decoder
        if self.routing == "shared":
            yield "unet", next(iter(self.tasks.values())).engine
            shallow = next((one.step_cache for one in self.tasks.values() if one.step_cache is not None), None)
            if shallow is not None:
                yield "unet.shallow", shallow.engine
            return
        for name, entry in self.tasks.items():
            yield f"tasks.{name}.engine", entry.engine
            if entry.step_cache is not None:
                yield f"tasks.{name}.step_cache.engine", entry.step_cache.engine

    def references(self) -> Iterator[tuple[str, str]]:
        """(where it is said, path) of every file the manifest points to."""
        for where, text in self.texts.items():
            yield f"{where}.tokenizer", text.tokenizer
        for where, engine in self.engines():
            yield where, engine.path
            if engine.prebuilt is not None:
                yield f"{where}.prebuilt", engine.prebuilt
            if engine.weights is not None:
                yield f"{where}.weights", engine.weights
        for name, entry in self.tasks.items():
            if entry.reference is not None:
                yield f"tasks.{name}.reference", entry.reference

    def check(self) -> None:
        """``BundleError`` if the manifest contradicts itself or points outside the bundle or its list of files."""
        if not self.tasks:
            raise BundleError(f"{MANIFEST}: no tasks")
        if self.routing == "shared":
            self._check_shared()
        self._check_texts()
        for path in self.files:
            check_relative(path, "files")
        check_distinct(self.files)
        for where, path in self.references():
            check_relative(path, where)
            if path not in self.files:
                raise BundleError(f"{MANIFEST}: {where} names {path!r}, which is not among the bundle's files")
        for where, engine in self.engines():
            if (engine.weights is None) != (engine.weights_bytes is None):
                raise BundleError(f"{MANIFEST}: {where} needs both weights and weights_bytes, or neither")
        for name, entry in self.tasks.items():
            if entry.task.name != name:
                raise BundleError(f"{MANIFEST}: tasks.{name} describes a task called {entry.task.name!r}")
            if (entry.accuracy is None) == (entry.accuracy_reason is None):
                raise BundleError(f"{MANIFEST}: tasks.{name} needs either an accuracy or the reason why there is none")
        if any(side % self.vae_scale for side in self.image_size):
            raise BundleError(f"{MANIFEST}: image_size {self.image_size} is not a multiple of {self.vae_scale}")

    def _check_texts(self) -> None:
        """``BundleError`` unless the text encoders are those of the family."""
        family, texts = FAMILIES[self.family], list(self.texts.values())
        if len(texts) != len(family.texts):
            raise BundleError(
                f"{MANIFEST}: family {family.name!r} has {len(family.texts)} text encoders, and there are {len(texts)}"
            )
        for where, text in self.texts.items():
            if text.max_length != self.text.max_length:
                raise BundleError(
                    f"{MANIFEST}: {where}.max_length is {text.max_length}, and text.max_length {self.text.max_length}"
                )
        if sum(text.pooled is not None for text in texts) != sum(branch.pooled for branch in family.texts):
            raise BundleError(f"{MANIFEST}: family {family.name!r} wants other pooled outputs of its text encoders")

    def _check_shared(self) -> None:
        """``BundleError`` unless all tasks have the same UNet, in which each has a row of its own."""
        first, *others = self.tasks.items()
        rows = {first[1].task_id: first[0]}
        for name, entry in others:
            if entry.engine != first[1].engine:
                raise BundleError(
                    f"{MANIFEST}: routing is 'shared', and tasks.{first[0]}.engine and tasks.{name}.engine differ"
                )
            if (known := rows.setdefault(entry.task_id, name)) != name:
                raise BundleError(f"{MANIFEST}: tasks {known!r} and {name!r} share a UNet and task_id {entry.task_id}")
        shallow = [one.step_cache.engine for one in self.tasks.values() if one.step_cache is not None]
        if any(engine != shallow[0] for engine in shallow):
            raise BundleError(f"{MANIFEST}: routing is 'shared', and the tasks' step_cache.engine differ")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; infinite and undefined floats become ``"inf"``, ``"-inf"`` and ``"nan"``."""
        encoded: dict[str, Any] = encode(self)
        return {"schema_version": SCHEMA_VERSION, **encoded}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """The inverse of ``to_json``, which reads earlier schema versions, too.

        Raises:
            BundleError: naming the entry that is wrong, or a schema version that is not known.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if type(version) is not int or (version != SCHEMA_VERSION and version not in UPGRADES):
            known = ", ".join(map(str, sorted({*UPGRADES, SCHEMA_VERSION})))
            raise BundleError(
                f"{MANIFEST}: schema version {version!r} is not known",
                hint=f"this mtu-compile reads versions {known}; rebuild the bundle, or install the one that made it",
            )
        body: Mapping[str, Any] = {k: v for k, v in data.items() if k != "schema_version"}
        try:
            manifest = conform(cls, UPGRADES[version](body) if version in UPGRADES else body)
        except Mismatch as mismatch:
            raise mismatch.at(MANIFEST, error=BundleError) from mismatch
        assert isinstance(manifest, cls)
        return manifest


def check_relative(path: str, where: str) -> None:
    """``BundleError`` unless ``path`` stays inside the bundle on every system, and is written in one way only."""
    pure, windows = PurePosixPath(path), PureWindowsPath(path)
    outside = pure.is_absolute() or windows.drive or windows.root or ".." in pure.parts
    if outside or "\\" in path or not path.isprintable() or path in ("", ".") or str(pure) != path:
        raise BundleError(
            f"{MANIFEST}: {where} names {path!r}, which is not a plain path inside the bundle",
            hint="do not use this bundle; get it again from where it was built",
        )


def check_distinct(paths: Iterable[str]) -> None:
    """``BundleError`` if two paths are one where case does not count or letters are composed (Windows, macOS).

    Nor may any be in the place of the manifest, of the signature, of what a board builds, or of another's folder.
    """
    seen = {_folded(name): (name, False) for name in (MANIFEST, SIGNATURE, BUILT)}
    for path in paths:
        parts = path.split("/")
        for end in range(1, len(parts) + 1):
            here = ("/".join(parts[:end]), end < len(parts))  # and whether it is a folder
            before = seen.setdefault(_folded(here[0]), here)
            if before is not here and not (before == here and here[1]):
                raise BundleError(f"{MANIFEST}: files names {path!r}, which collides with {before[0]!r}")


def _folded(path: str) -> str:
    """One text for all that some file system takes for the same name."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())
