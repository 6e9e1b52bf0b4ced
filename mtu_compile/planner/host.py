"""What a build needs of the machine it runs on: memory, known from the configs in a second, and a rough time.

Fitted to peaks that were measured (docs/decisions/0008-planner.md), and rounded up: 1.4 GB for the example, 2.4 GB for
one task of it at 256x256, 6.6 GB for four tasks of Stable Diffusion 1.5's size. Three things cost memory: the
libraries; the weights, which stay mapped from their files nearly everywhere, and are held once by the runtimes that lay
them out anew; and attention, whose scores ONNX Runtime writes out, growing with the fourth power of the picture's side.
What files have mapped is not counted: the system takes it back when it needs room, and then reads it again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mtu_compile.core.amounts import readable
from mtu_compile.core.errors import ConfigError
from mtu_compile.core.host_memory import host_memory
from mtu_compile.core.tasks import Task

#: Python with torch, diffusers, ONNX Runtime, OpenVINO and NNCF; bytes.
LIBRARIES = 1_400_000_000
#: How often the weights of one UNet, in float32, are held at the worst moment, when layers are chosen (measured: 1.4).
WEIGHTS = 1.6
#: The same of the other networks, while these are exported: the worst moment where text encoders are large and the
#: UNet is not.
OTHERS = 2.0
#: How often the largest attention's scores are: the product, its softmax, and what NNCF keeps (measured: 2.2).
SCORES = 2.5
#: Feature maps of full size that are alive at once, in UNet and autoencoder: a residual block's, and a copy.
FEATURES = 6.0

#: Part of a large matrix product's speed that a build reaches.
EFFICIENCY = 0.4
#: Seconds that do not grow with the network's work: for the build, for each task, and for each gigabyte of weights.
FIXED_SECONDS, TASK_SECONDS, WEIGHT_SECONDS = 45.0, 20.0, 25.0

METHOD = "estimated from the model's configs and peaks measured before; the time by this machine's speed, roughly"


@dataclass(frozen=True)
class HostPlan:
    """A build's needs of the machine it runs on; every figure is an estimate.

    Attributes:
        picture: the size, as it is typed (``"512x512"``).
        libraries_bytes, weights_bytes, scores_bytes, features_bytes: what the memory is for, see the module.
        available_bytes: memory of this machine, or what was said instead; ``None`` where nobody knows.
        smaller: a size that fits, as it is typed; ``None`` where this one does, or none is known.
        seconds: roughly; ``None`` before the graphs are there.
    """

    picture: str
    libraries_bytes: int
    weights_bytes: int
    scores_bytes: int
    features_bytes: int
    available_bytes: int | None
    smaller: str | None = None
    seconds: float | None = None

    @property
    def memory_bytes(self) -> int:
        """All of it."""
        return self.libraries_bytes + self.weights_bytes + self.scores_bytes + self.features_bytes

    @property
    def fits(self) -> bool | None:
        """Whether this machine has the memory; ``None`` if nobody knows."""
        return None if self.available_bytes is None else self.memory_bytes <= self.available_bytes

    def require(self) -> None:
        """``ConfigError`` (exit code 2) where this machine cannot build it."""
        if self.fits is not False or self.available_bytes is None:
            return
        parts = f"weights {readable(self.weights_bytes)}, attention {readable(self.scores_bytes)}, "
        parts += f"feature maps {readable(self.features_bytes)}, libraries {readable(self.libraries_bytes)}"
        hint = "build on a machine with more memory; or, if you know better, say --build-memory"
        raise ConfigError(
            f"building {self.picture} pictures needs about {readable(self.memory_bytes)} of this machine's memory, "
            f"which has {readable(self.available_bytes)} (estimate: {parts})",
            hint=f"--size {self.smaller} fits; or {hint}" if self.smaller else hint,
        )

    def require_export(self) -> None:
        """The same where not even the graphs can be exported: that wants feature maps, but no attention is run."""
        if self.available_bytes is not None and self.libraries_bytes + self.features_bytes > self.available_bytes:
            self.require()

    def __str__(self) -> str:
        has = "" if self.available_bytes is None else f" of the {readable(self.available_bytes)} there are"
        took = "" if self.seconds is None else f" and roughly {_minutes(self.seconds)}"
        return f"the build itself needs about {readable(self.memory_bytes)}{has} on this machine{took} (estimate)"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory_bytes": self.memory_bytes, "fits": self.fits, "method": METHOD}


def plan_host(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    tasks: Sequence[Task],
    picture: tuple[int, int],
    weights: int,
    others: int = 0,
    *,
    memory: int | None = None,
    stand_in: float = 0.0,
) -> HostPlan:
    """The memory a build needs, from the configs alone.

    Args:
        unet, vae: their ``config.json``.
        tasks: what is built.
        picture: height and width in pixels.
        weights: numbers in the UNet of one task.
        others: numbers in all text encoders and the autoencoder.
        memory: bytes the build may use, instead of what this machine has.
        stand_in: how often the UNet's float32 weights are held by what runs it here instead of the device.
    """
    available = host_memory() if memory is None else memory
    batch = max((task.unet_batch for task in tasks), default=1)

    def at(height: int, width: int, smaller: str | None = None) -> HostPlan:
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        latent = height // scale, width // scale
        maps = batch * unet["block_out_channels"][0] * latent[0] * latent[1]
        return HostPlan(
            f"{width}x{height}",
            LIBRARIES,
            int(4 * max(max(WEIGHTS, stand_in) * weights, OTHERS * others)),
            int(SCORES * max((4 * batch * one for one in _scores(unet, vae, latent)), default=0)),
            int(FEATURES * 4 * max(maps, vae["block_out_channels"][0] * height * width)),
            available,
            smaller,
        )

    found = at(*picture)
    if found.fits is not False:
        return found
    unit = 2 ** (len(vae["block_out_channels"]) + len(unet["block_out_channels"]) - 2)
    # Of the same proportions, in steps of an eighth and then halved, the largest that fits.
    for part in (eighths / 8 / 2**halvings for halvings in range(16) for eighths in (8, 7, 6, 5)):
        height, width = (int(side * part) // unit * unit for side in picture)
        if min(height, width) >= unit and at(height, width).fits:
            return at(*picture, smaller=f"{width}x{height}")
    return found


def rough_seconds(
    multiply_adds: Mapping[str, int], calls: Mapping[str, float], weights_bytes: int, *, flops: float | None = None
) -> float:
    """How long a build takes, roughly.

    Args:
        multiply_adds: by task, of one UNet call.
        calls: by task, how many UNet calls' worth of work it is, in float32.
        weights_bytes: of one task's UNet in float32.
        flops: operations a second of this machine; measured if not given.
    """
    rate = (flops or machine_flops()) * EFFICIENCY
    work = sum(2.0 * multiply_adds[task] * calls[task] for task in multiply_adds)
    fixed = FIXED_SECONDS + TASK_SECONDS * len(multiply_adds)
    return fixed + WEIGHT_SECONDS * (1 + len(multiply_adds)) * weights_bytes / 1e9 + work / rate


def machine_flops(side: int = 1024) -> float:
    """Operations a second of this machine in a float32 matrix product; takes a tenth of a second."""
    numbers = np.ones((side, side), np.float32)
    best = 0.0
    for _ in range(3):
        began = time.perf_counter()
        numbers @ numbers
        best = max(best, 2.0 * side**3 / (time.perf_counter() - began))
    return best


def _scores(unet: Mapping[str, Any], vae: Mapping[str, Any], latent: tuple[int, int]) -> Iterator[int]:
    """Numbers in the scores of each level's attention to itself, for one sample."""
    kinds, levels = unet["down_block_types"], len(unet["block_out_channels"])
    # What diffusers calls the dimension of a head is their number, unless that is given.
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim") or 8
    attending = [level for level, kind in enumerate(kinds) if "Attn" in kind]
    if unet.get("mid_block_type"):
        attending.append(levels - 1)
    for level in attending:
        tokens = (latent[0] >> level) * (latent[1] >> level)
        yield (heads if isinstance(heads, int) else heads[level]) * tokens**2
    if vae.get("mid_block_add_attention", True):
        yield (latent[0] * latent[1]) ** 2


def _minutes(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.0f} hours"
