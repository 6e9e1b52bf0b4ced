"""What a machine with an NVIDIA GPU builds itself, and what it is: its GPU, CUDA, TensorRT and Jetson Linux."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtu_compile.bundle import EngineRef
from mtu_compile.bundle.requirements import BoardRequirements, JetPackRecord
from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import ConfigError, TargetError
from mtu_compile.core.progress import Advance
from mtu_compile.runtime.builder import Built, Host
from targets.nvidia import cuda
from targets.nvidia.builder import build_engine
from targets.nvidia.library import version
from targets.nvidia.recipe import Recipe

#: The libraries, and what NVIDIA calls them.
KINDS: Mapping[str, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

#: Written by Jetson Linux, its release in the first line.
_JETSON_RELEASE = Path("/etc/nv_tegra_release")

#: What TensorRT keeps of earlier builds' timings.
TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class Fingerprint:
    """The GPU and library an engine is good for.

    TensorRT engines are neither portable between GPUs nor between versions, and an engine of another device loads with
    a warning at best and crashes at worst.

    Attributes:
        tensorrt: version of the library that builds and runs the engine ("10.3.0").
        name: of the GPU; this and the next two are ``None`` where an engine was built without a GPU.
        compute_capability: "8.7".
        driver: newest CUDA the driver runs ("12.6").
    """

    tensorrt: str
    name: str | None = None
    compute_capability: str | None = None
    driver: str | None = None

    def __str__(self) -> str:
        gpu = (
            f"{self.name} (compute capability {self.compute_capability}, CUDA {self.driver})" if self.name else "no GPU"
        )
        return f"{gpu}, TensorRT {self.tensorrt}"

    def foreign(self, kind: str, recipe: Mapping[str, str], here: Fingerprint) -> str | None:
        """Why an engine that was built on this GPU does not belong on ``here``; ``None`` if it does."""
        if self.tensorrt != here.tensorrt:
            return f"it was built with TensorRT {self.tensorrt}, and this is {here.tensorrt}"
        if gpus := named_gpus(kind, recipe):
            if here.compute_capability in (None, *gpus):
                return None
            return f"it was built for compute capability {', '.join(gpus)}, and this GPU has {here.compute_capability}"
        return None if self == here else f"it was built on {self}, and this is {here}"


def named_gpus(kind: str, config: Mapping[str, str]) -> tuple[str, ...]:
    """The compute capabilities an engine is built for without asking the GPU at hand; empty if it asks that.

    TensorRT-RTX builds for GPUs by name. A recipe of TensorRT itself may name one too, but only to be checked: its
    builder always builds for the GPU at hand.
    """
    return Recipe.from_config(config).compute_capabilities if kind == "tensorrt-rtx" else ()


@dataclass(frozen=True)
class NvidiaMachine:
    """A machine as NVIDIA's libraries see it; what is not there is ``None``, with the reason in ``missing``.

    Attributes:
        host: the machine as such.
        jetson_linux: first line of the Jetson Linux release, on a Jetson.
        gpu: the CUDA device.
        tensorrt: version by kind ("tensorrt", "tensorrt-rtx").
        missing: reason by what is missing ("gpu", "tensorrt", "tensorrt-rtx").
        device: what is built for.
    """

    host: Host
    jetson_linux: str | None
    gpu: cuda.Device | None
    tensorrt: Mapping[str, str]
    missing: Mapping[str, TargetError]
    device: str = "GPU"

    @property
    def free_bytes(self) -> int | None:
        """Memory the GPU can still take.

        On a Jetson, CPU and GPU share it, and CUDA does not count what the kernel would free first (CUDA for Tegra
        application note, "Estimating Total Allocatable Device Memory").
        """
        if self.gpu is None:
            return None
        shared = self.jetson_linux is not None
        return max(self.gpu.free_bytes, self.host.available_bytes or 0) if shared else self.gpu.free_bytes

    def fingerprint(self, kind: str) -> Fingerprint:
        """See ``Builder.fingerprint``; without a GPU, of the library alone. ``ToolchainMissing`` without that."""
        if kind not in self.tensorrt:
            raise self.missing[kind]
        if self.gpu is None:
            return Fingerprint(self.tensorrt[kind])
        return Fingerprint(self.tensorrt[kind], self.gpu.name, self.gpu.compute_capability, self.gpu.driver)

    def check(self, target: str, refs: Sequence[EngineRef], requirements: BoardRequirements | None) -> tuple[str, ...]:
        """See ``mtu_compile.runtime.builder.Machine``."""
        kinds = dict.fromkeys(ref.kind for ref in refs)
        for kind in kinds:
            if kind in self.missing:
                raise self.missing[kind]
        for ref in refs:
            if not named_gpus(ref.kind, ref.config):
                self._check_gpu(target, ref)
        return self.check_versions(requirements) if "tensorrt" in kinds and requirements is not None else ()

    def _check_gpu(self, target: str, ref: EngineRef) -> None:
        if self.gpu is None:
            raise self.missing["gpu"]
        wanted = Recipe.from_config(ref.config).compute_capabilities
        if wanted and self.gpu.compute_capability not in wanted:
            raise TargetError(
                f"this bundle is for {target}, compute capability {', '.join(wanted)}, and the GPU here, "
                f"{self.gpu.name}, has {self.gpu.compute_capability}",
                hint="build the bundle for this device: mtu-compile targets lists them",
            )

    def check_versions(self, requirements: BoardRequirements) -> tuple[str, ...]:
        """Notes on unusual versions of TensorRT and Python; ``TargetError`` if TensorRT is too old."""
        notes = []
        have = self.tensorrt["tensorrt"]
        oldest, newest = requirements.tensorrt
        if _version(have) < _version(oldest):
            raise TargetError(
                f"this bundle needs TensorRT {oldest} or newer, and here is {have}",
                hint="update JetPack: " + "; ".join(_describe(line) for line in requirements.jetpack),
            )
        if _version(have)[:2] > _version(newest):
            notes.append(f"TensorRT {have} is newer than {newest}, the newest this was written for")
        if requirements.python and self.host.python not in requirements.python:
            known = " and ".join(requirements.python)
            notes.append(
                f"Python {self.host.python} is none of JetPack's ({known}); TensorRT's own bindings are for those"
            )
        return tuple(notes)

    def rows(self) -> tuple[tuple[str, str], ...]:
        rows = [("Jetson Linux", self.jetson_linux)] if self.jetson_linux else []
        if self.gpu is None:
            rows.append(("GPU", self._absent("gpu")))
        else:
            free, total = readable(self.free_bytes or 0), readable(self.gpu.total_bytes)
            rows += [
                ("GPU", f"{self.gpu.name}, compute capability {self.gpu.compute_capability}"),
                ("CUDA", f"{self.gpu.driver} (driver)"),
                ("GPU memory", f"{free} of {total} free"),
            ]
        rows += [(name, self.tensorrt.get(kind) or self._absent(kind)) for kind, name in KINDS.items()]
        return tuple(rows)

    def _absent(self, name: str) -> str:
        error = self.missing[name]
        return f"none: {error.message}" + (f" ({error.hint})" if error.hint else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "jetson_linux": self.jetson_linux,
            "gpu": None if self.gpu is None else asdict(self.gpu),
            "free_gpu_bytes": self.free_bytes,
            "tensorrt": dict(self.tensorrt),
        }


class NvidiaBuilder:
    """TensorRT and TensorRT-RTX as ``mtu_compile.runtime.builder.Builder``."""

    #: 3.4 GB for an SD 1.5-sized INT8 graph of 0.86 GB (TensorRT-RTX 1.7, no GPU). Not measured on a Jetson.
    peak_factor = 4.0

    #: 905 MB from 861 MB in the same build, rounded up.
    engine_factor = 1.1

    def probe(self, host: Host) -> NvidiaMachine:
        missing: dict[str, TargetError] = {}
        gpu: cuda.Device | None = None
        try:
            gpu = cuda.device_info()
        except TargetError as error:
            missing["gpu"] = error
        tensorrt: dict[str, str] = {}
        for kind in KINDS:
            try:
                tensorrt[kind] = version(kind)
            except TargetError as error:
                missing[kind] = error
        return NvidiaMachine(host, _jetson_linux(), gpu, tensorrt, missing)

    def fingerprint(self, kind: str) -> Fingerprint:
        device = cuda.device_info()
        return Fingerprint(version(kind), device.name, device.compute_capability, device.driver)

    def read_fingerprint(self, raw: Mapping[str, Any]) -> Fingerprint:
        return Fingerprint(**raw)

    def build(
        self, graph: Path, out: Path, config: Mapping[str, str], *, kind: str, folder: Path, advance: Advance
    ) -> Built:
        recipe = Recipe.from_config(config)
        return build_engine(graph, out, recipe, kind=kind, timing_cache=folder / TIMING_CACHE, advance=advance)


def _jetson_linux() -> str | None:
    try:
        lines = _JETSON_RELEASE.read_text(encoding="utf-8", errors="replace").strip("\x00\n ").splitlines()
    except OSError:
        return None
    return lines[0].lstrip("# ") if lines else None


def _describe(line: JetPackRecord) -> str:
    first, last = line.version
    return f"{first} to {last} bring TensorRT {line.tensorrt} or newer"


def _version(text: str) -> tuple[int, ...]:
    """``"10.3.0.26"`` → ``(10, 3, 0, 26)``; what follows the numbers is left out."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    if not numbers:
        raise ConfigError(f"{text!r} is not a version")
    return tuple(numbers)


BUILDER = NvidiaBuilder()
