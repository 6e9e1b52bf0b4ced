"""What a bundle says about itself: frozen dataclasses and their form in ``manifest.json``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import PurePosixPath, PureWindowsPath
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mtu_compile.core.errors import BundleError, MtuError
from mtu_compile.core.fit import Fit
from mtu_compile.core.tasks import Task

MANIFEST = "manifest.json"

#: Folder of engines that the machine the bundle lies on built from it; not part of what the manifest vouches for.
BUILT = "built"

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class EngineRef:
    """A network inside the bundle: the portable graph, and beside it the engine if it was built in advance.

    Attributes:
        kind: which engine class opens it (``"openvino"``, ``"tensorrt"``, ``"tensorrt-rtx"``).
        path: the graph (an IR's ``.xml``, or ONNX), relative to the bundle.
        config: handed to the vendor runtime (``{"INFERENCE_PRECISION_HINT": "bf16"}``), and ``"device"``.
        prebuilt: engine or NPU blob made from the graph on the build machine, relative to the bundle.
        status: what was done with it there, in words (``"built, not run: no NVIDIA GPU on this machine"``).
        estimate: the toolchain's own figures about the device, with their ``source``; never measured ones.
    """

    kind: str
    path: str
    config: Mapping[str, str] = field(default_factory=dict)
    prebuilt: str | None = None
    status: str = ""
    estimate: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Source:
    """The checkpoint the bundle was compiled from: its name, and the SHA-256 of its weights."""

    name: str
    sha256: str


@dataclass(frozen=True)
class TextPart:
    """Tokenizer (path of ``tokenizer.json``) and text encoder.

    Attributes:
        max_length: L, tokens a prompt is padded or cut to.
        pad_id: token id it is padded with.
    """

    tokenizer: str
    max_length: int
    pad_id: int
    engine: EngineRef


@dataclass(frozen=True)
class PassRecord:
    """One graph pass that ran: its id, whether it changed the graph, and in how many places."""

    id: str
    changed: bool
    rewrites: int


@dataclass(frozen=True)
class TaskEntry:
    """One task of the bundle.

    Attributes:
        task: its description.
        task_id: its index in the source checkpoint.
        engine: its UNet.
        default_steps: denoising steps unless the user says otherwise.
        passes: what was done to its graph.
        calibration: SHA-256 of the calibration set, or ``None`` if the engine is not calibrated.
        accuracy: what the comparison with the float original measured, and on what (``measured_with``), or ``None``
            with ``accuracy_reason``.
        accuracy_reason: why nothing was measured.
        reference: path of the float reference (safetensors), if the bundle carries one.
        extra: provenance for people: calibration details, build times.
    """

    task: Task
    task_id: int
    engine: EngineRef
    default_steps: int
    passes: tuple[PassRecord, ...] = ()
    calibration: str | None = None
    accuracy: Mapping[str, Any] | None = None
    accuracy_reason: str | None = None
    reference: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


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
        vae_encoder: picture → moments; ``None`` if no task of the bundle takes a picture.
        vae_decoder: latent → picture.
        scheduler: contents of the checkpoint's ``scheduler_config.json``.
        tasks: by name, in the order of the checkpoint.
        fit: what becomes of pictures of other proportions than ``image_size``, unless the user says otherwise; what the
            references were made with. A manifest that does not say stretches: that is what there was before there were
            others.
        files: SHA-256 of every file of the bundle except the manifest; filled in by ``write``.
        extra: provenance for people.
    """

    tools: Mapping[str, str]
    source: Source
    target: str
    precision: str
    image_size: tuple[int, int]
    latent_channels: int
    vae_scale: int
    scaling_factor: float
    text: TextPart
    vae_encoder: EngineRef | None
    vae_decoder: EngineRef
    scheduler: Mapping[str, Any]
    tasks: Mapping[str, TaskEntry]
    fit: Fit = "stretch"
    files: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent (height, width)."""
        return self.image_size[0] // self.vae_scale, self.image_size[1] // self.vae_scale

    def engines(self) -> Iterator[tuple[str, EngineRef]]:
        """(where it is said, network) of every network of the bundle."""
        yield "text.engine", self.text.engine
        if self.vae_encoder is not None:
            yield "vae_encoder", self.vae_encoder
        yield "vae_decoder", self.vae_decoder
        for name, entry in self.tasks.items():
            yield f"tasks.{name}.engine", entry.engine

    def references(self) -> Iterator[tuple[str, str]]:
        """(where it is said, path) of every file the manifest points to."""
        yield "text.tokenizer", self.text.tokenizer
        for where, engine in self.engines():
            yield where, engine.path
            if engine.prebuilt is not None:
                yield f"{where}.prebuilt", engine.prebuilt
        for name, entry in self.tasks.items():
            if entry.reference is not None:
                yield f"tasks.{name}.reference", entry.reference

    def check(self) -> None:
        """``BundleError`` if the manifest contradicts itself or points outside the bundle or its list of files."""
        for path in self.files:
            check_relative(path, "files")
            if PurePosixPath(path).parts[0] == BUILT:
                raise BundleError(f"{MANIFEST}: files names {path!r}, and {BUILT}/ is for what a board builds")
        for where, path in self.references():
            check_relative(path, where)
            if path not in self.files:
                raise BundleError(f"{MANIFEST}: {where} names {path!r}, which is not among the bundle's files")
        for name, entry in self.tasks.items():
            if entry.task.name != name:
                raise BundleError(f"{MANIFEST}: tasks.{name} describes a task called {entry.task.name!r}")
            if (entry.accuracy is None) == (entry.accuracy_reason is None):
                raise BundleError(f"{MANIFEST}: tasks.{name} needs either an accuracy or the reason why there is none")
            if entry.default_steps < 1:
                raise BundleError(f"{MANIFEST}: tasks.{name}.default_steps is {entry.default_steps}")
        if not self.tasks:
            raise BundleError(f"{MANIFEST}: no tasks")
        if self.vae_scale < 1 or self.latent_channels < 1 or self.text.max_length < 1 or not self.scaling_factor:
            raise BundleError(f"{MANIFEST}: vae_scale, latent_channels, max_length and scaling_factor are positive")
        if any(side < 1 or side % self.vae_scale for side in self.image_size):
            raise BundleError(f"{MANIFEST}: image_size {self.image_size} is not a multiple of {self.vae_scale}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; infinite and undefined floats become ``"inf"``, ``"-inf"`` and ``"nan"``."""
        encoded: dict[str, Any] = _encode(self)
        return {"schema_version": SCHEMA_VERSION, **encoded}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """The inverse of ``to_json``; ``BundleError`` naming the entry that is wrong, or the schema version."""
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise BundleError(
                f"{MANIFEST}: schema version {version!r} is not known",
                hint=f"this mtu-compile reads version {SCHEMA_VERSION}; rebuild the bundle, or install the version "
                "that made it",
            )
        manifest = _decode(cls, {k: v for k, v in data.items() if k != "schema_version"}, "")
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


def _encode(value: Any) -> Any:
    if isinstance(value, Task):
        return value.to_json()
    if is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _decode(kind: Any, value: Any, where: str) -> Any:
    """``value`` from JSON as the annotated type ``kind``; ``where`` is its place in the manifest."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Union or (origin is not None and NoneType in args):
        return None if value is None else _decode(next(a for a in args if a is not NoneType), value, where)
    if kind is Task and isinstance(value, Mapping):
        try:
            return Task.from_json(value)
        except (MtuError, AttributeError, TypeError) as error:
            raise BundleError(f"{MANIFEST}: {where}: {error}") from error
    if isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        return _decode_dataclass(kind, value, where)
    if origin is Literal:
        if isinstance(value, str) and value in args:
            return value
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    elif origin is tuple and isinstance(value, list):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif kind in (str, int, bool) and type(value) is kind:
        return value
    raise BundleError(f"{MANIFEST}: {where or 'the top level'} is {value!r:.80}, which is not what belongs there")


def _decode_dataclass(kind: type, value: Mapping[str, Any], where: str) -> Any:
    prefix = f"{where}." if where else ""
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    for name in value:
        if name not in known:
            raise BundleError(f"{MANIFEST}: unknown entry {prefix}{name}")
    for name, f in known.items():
        if name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise BundleError(f"{MANIFEST}: {prefix}{name} is missing")
    return kind(**{name: _decode(hints[name], item, prefix + name) for name, item in value.items()})
