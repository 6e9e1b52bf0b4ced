"""Calibration sets: real UNet inputs of one task of one model, on disk as safetensors that cannot be mistaken.

A set knows what it was made for and hashes its content. ``verify`` refuses a set for another task or model, one whose
bytes have changed, and tensors that do not come from a denoising trajectory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtu_compile.core import noise
from mtu_compile.core.atomic import atomic_file
from mtu_compile.core.errors import CalibrationError

FORMAT = "mtu-calibration-2"
CAPTURE_HINT = "capture it again from this model: mtu-compile calibrate MODEL --data DIR -o SET"

#: Distance between the seeds of calibration and those of checks: no engine is checked on noise it was calibrated with.
SEED_OFFSET = 1_000_000

Array = NDArray[Any]
Inputs = Mapping[str, Array]

#: The two most alike neighbouring latents of a real trajectory correlate: towards the end a sampler changes less and
#: less. Least values measured with 13 schedulers of diffusers on a trained 9M-parameter model, 6 to 50 steps: 0.98 for
#: samplers without fresh noise, 0.80 for ancestral ones, 0.59 for LCM, which draws all noise anew at every step.
#: Independent numbers correlate by less than 6 / sqrt(n) but once in 10^9 times: 0.38 for the smallest latents in use
#: (n = 4 * 8 * 8), 0.05 for those of SD 1.5.
CORRELATION_SIGMAS = 6.0

#: With fewer calls kept of a trajectory, neighbours may be too far apart to be correlated (LCM: 0.34 at 4 steps).
LEAST_CALLS = 6

#: Least correlation of a trajectory's first latent with the noise of its seed: 1 but for half precision, 0 for others.
LEAST_NOISE = 0.99

#: How much less alike neighbours may be, on the mean, than the first and the last latent of a trajectory. They are more
#: alike in every real one; the margin is for trajectories in which all are alike to the third digit.
ORDER_MARGIN = 0.05


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of one task's static graph along real denoising trajectories.

    Attributes:
        task: name of the task.
        model_sha256: hash of the model folder (``mtu_compile.core.hashing.model_sha256``).
        inputs: one mapping a UNet call: ``sample`` [b, 4+c, h, w], ``timestep`` [1], ``encoder_hidden_states``
            [b, L, D], float32; trajectory after trajectory, in the order of the calls.
        timesteps: of each call, from the scheduler.
        trajectories: for each call the trajectory it belongs to, an index into ``prompts`` and ``seeds``.
        prompts: of each trajectory.
        seeds: of each trajectory's initial noise.
        scheduler: the scheduler's class name and configuration.
        steps: denoising steps of a whole trajectory, of which a part may be kept, the first step always.
        latent_channels: channels of the noisy latent; what follows them in ``sample`` is the condition.
        size: height and width of the pictures in pixels.
        strategy: which calls of a trajectory were kept (``calibration.capture.Sampling``), or the name of a baseline.
        producer: tools that made the set, with versions.
        latents: of each trajectory what it ended with, [P, 1, C, h, w] float32; ``None`` if that was not kept.
    """

    task: str
    model_sha256: str
    inputs: Sequence[Inputs]
    timesteps: Sequence[float]
    trajectories: Sequence[int]
    prompts: Sequence[str]
    seeds: Sequence[int]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0
    latent_channels: int = 4
    size: Sequence[int] = ()
    strategy: str = "stratified"
    producer: Mapping[str, str] = field(default_factory=dict)
    latents: Array | None = None

    @property
    def sha256(self) -> str:
        """Hash of everything in the set; equal sets have equal hashes."""
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        for inputs in self.inputs:
            for name in sorted(inputs):
                array = np.ascontiguousarray(inputs[name])
                digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
                digest.update(array.tobytes())
        if self.latents is not None:
            digest.update(f"latents {self.latents.shape}\n".encode() + self.latents.tobytes())
        return digest.hexdigest()

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "task": self.task,
            "model_sha256": self.model_sha256,
            "timesteps": [float(t) for t in self.timesteps],
            "trajectories": [int(i) for i in self.trajectories],
            "prompts": list(self.prompts),
            "seeds": [int(s) for s in self.seeds],
            "scheduler": dict(self.scheduler),
            "steps": self.steps,
            "latent_channels": self.latent_channels,
            "size": [int(side) for side in self.size],
            "strategy": self.strategy,
            "producer": dict(self.producer),
        }

    def describe(self) -> dict[str, Any]:
        """What a reader wants to know of a set, as JSON: hash, strategy, extent, seed, and the timesteps it met."""
        return {
            "sha256": self.sha256,
            "strategy": self.strategy,
            "pictures": len(self.prompts),
            "calls": len(self.inputs),
            "steps": self.steps,
            "seed": min(self.seeds, default=SEED_OFFSET) - SEED_OFFSET,
            "timesteps": sorted({float(t) for t in self.timesteps}, reverse=True),
        }

    def save(self, path: Path) -> None:
        """Write one safetensors file. Arrays that repeat (text along a trajectory) are stored once."""
        tensors: dict[str, Array] = {}
        for name in self.inputs[0] if self.inputs else ():
            table, index = _distinct(inputs[name] for inputs in self.inputs)
            tensors[f"{name}.values"], tensors[f"{name}.index"] = table, index
        if self.latents is not None:
            tensors["latents"] = np.ascontiguousarray(self.latents)
        # One entry: safetensors writes several in any order, and equal sets should be equal files.
        described = {**self._header(), "sha256": self.sha256}
        with atomic_file(path) as partial:
            save_file(tensors, partial, {"set": json.dumps(described, sort_keys=True)})

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        """Read a file written by ``save``.

        Raises:
            CalibrationError: no such file, not a calibration set, or its content does not match its hash.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if "set" not in metadata:
                    raise CalibrationError(f"{path} does not say what it was made for", hint=CAPTURE_HINT)
                header = json.loads(metadata["set"])
                recorded = header.pop("sha256")
                if header.pop("format", None) != FORMAT:
                    raise CalibrationError(f"{path} is not a calibration set of this version", hint=CAPTURE_HINT)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            names = sorted(name.removesuffix(".values") for name in tensors if name.endswith(".values"))
            inputs = tuple(
                {name: tensors[f"{name}.values"][tensors[f"{name}.index"][i]] for name in names}
                for i in range(len(header["timesteps"]))
            )
            loaded = cls(inputs=inputs, latents=tensors.get("latents"), **header)
            intact = loaded.sha256 == recorded
        except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(f"{path} cannot be read: {error}", hint=CAPTURE_HINT) from error
        if not intact:
            raise CalibrationError(f"the content of {path} has changed since it was captured", hint=CAPTURE_HINT)
        return loaded

    def verify(self, *, task: str, model_sha256: str, shape: Sequence[int] | None = None) -> None:
        """Refuse a set that is not real data of this task of this model.

        Args:
            task: name of the task.
            model_sha256: hash of the model folder.
            shape: what ``sample`` [b, 4+c, h, w] has to be, for a graph of fixed shape.

        Raises:
            CalibrationError: saying which.
        """
        if self.task != task:
            raise CalibrationError(f"the calibration set is for task {self.task!r}, not {task!r}", hint=CAPTURE_HINT)
        if self.model_sha256 != model_sha256:
            raise CalibrationError(
                f"the calibration set was captured from another model ({self.model_sha256[:12]}, not "
                f"{model_sha256[:12]})",
                hint=CAPTURE_HINT,
            )
        if reason := self._incomplete() or self._misshapen(shape) or self._not_a_trajectory():
            raise CalibrationError(f"the calibration set for task {task!r} {reason}", hint=CAPTURE_HINT)

    def _incomplete(self) -> str | None:
        calls = len(self.inputs)
        if calls == 0:
            return "is empty"
        if len(self.timesteps) != calls or len(self.trajectories) != calls:
            return f"has {calls} inputs but {len(self.timesteps)} timesteps and {len(self.trajectories)} trajectories"
        if set(self.trajectories) != set(range(len(self.prompts))) or len(self.seeds) != len(self.prompts):
            return "does not say the prompt and seed of every trajectory"
        if not self.scheduler or not self.producer:
            return "does not say which scheduler and tools made it"
        for inputs, timestep in zip(self.inputs, self.timesteps, strict=True):
            if not {"sample", "timestep", "encoder_hidden_states"} <= inputs.keys():
                return f"has inputs {sorted(inputs)} instead of sample, timestep, encoder_hidden_states"
            if not all(np.isfinite(array).all() for array in inputs.values()):
                return "has values that are not finite"
            if float(np.ravel(inputs["timestep"])[0]) != np.float32(timestep):
                return "has inputs at other timesteps than it says"
        return None

    def _misshapen(self, shape: Sequence[int] | None) -> str | None:
        for inputs in self.inputs:
            found = inputs["sample"].shape
            if shape is not None and found != tuple(shape):
                pictures = "x".join(map(str, reversed(self.size)))
                return f"was captured for {pictures} pictures ({list(found)}), and the graph takes {list(shape)}"
        return None

    def _not_a_trajectory(self) -> str | None:
        """Why the inputs cannot come from denoising trajectories; ``None`` if they can."""
        for number, seed in enumerate(self.seeds):
            calls = [x for x, i in zip(self.inputs, self.trajectories, strict=True) if i == number]
            if reason := _inconsistent(calls, self.latent_channels) or _implausible(calls, self.latent_channels, seed):
                return f"is not from a denoising trajectory: {reason} (trajectory {number})"
            if _pictureless(calls[0], self.latent_channels):
                return f"was captured without pictures: its condition channels are all zero (trajectory {number})"
        return None


def _inconsistent(calls: Sequence[Inputs], channels: int) -> str | None:
    """What should be the same within one trajectory and is not: latents across a guidance batch, text, condition."""
    first = calls[0]
    for call in calls:
        latent = call["sample"][:, :channels]
        if not np.array_equal(latent, np.broadcast_to(latent[:1], latent.shape)):
            return "the parts of a guidance batch have different latents"
        if not np.array_equal(call["encoder_hidden_states"], first["encoder_hidden_states"]):
            return "the text changes from step to step"
        if not np.array_equal(call["sample"][:, channels:], first["sample"][:, channels:]):
            return "the condition changes from step to step"
    return None


def _pictureless(call: Inputs, channels: int) -> bool:
    """Whether there are condition channels, and nothing in them: a latent of a picture is never zero everywhere."""
    condition = call["sample"][:, channels:]
    return condition.size > 0 and not condition.any()


def _implausible(calls: Sequence[Inputs], channels: int, seed: int) -> str | None:
    """Why the latents of one trajectory cannot be a denoising; ``None`` if they can.

    It starts at the noise of its seed; time runs down; neighbouring latents are correlated, and less so the further
    apart they are, as the noise goes down along the schedule; yet every step changes something.
    """
    latents = [call["sample"][0, :channels].astype(np.float64).ravel() for call in calls]
    if correlation(latents[0], initial_noise(seed, calls[0]["sample"], channels).ravel()) < LEAST_NOISE:
        return "the first latent is not the noise of its seed"
    times = [float(np.ravel(call["timestep"])[0]) for call in calls]
    # Not step by step: samplers of second order (KDPM2) look back in between.
    if times[-1] >= times[0] and len(times) > 1:
        return "time does not run down"
    pairs = list(pairwise(latents))
    if any(np.array_equal(a, b) for a, b in pairs):
        return "latents do not change from step to step"
    if len(calls) < LEAST_CALLS:
        return None
    alike = [correlation(a, b) for a, b in pairs]
    if max(alike) < CORRELATION_SIGMAS / np.sqrt(latents[0].size):
        return f"neighbouring latents are not correlated (at most {max(alike):.2f}), as random numbers are"
    if float(np.mean(alike)) < correlation(latents[0], latents[-1]) - ORDER_MARGIN:
        return "distant latents are more alike than neighbouring ones"
    return None


def initial_noise(seed: int, sample: Array, channels: int) -> NDArray[np.float32]:
    """The noise [channels, h, w] that pipeline and on-board runtime start from for ``seed``."""
    return np.asarray(noise.initial_noise(seed, (1, channels, *sample.shape[2:]))[0])


def correlation(a: Array, b: Array) -> float:
    """Pearson correlation of two flat arrays; 0 if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0


def _distinct(arrays: Iterable[Array]) -> tuple[Array, NDArray[np.int64]]:
    """The distinct ones among ``arrays``, stacked, and for each array its place in the stack."""
    places: dict[bytes, int] = {}
    kept: list[Array] = []
    index = []
    for array in arrays:
        key = hashlib.sha256(array.tobytes()).digest()
        if key not in places:
            places[key] = len(kept)
            kept.append(array)
        index.append(places[key])
    return np.ascontiguousarray(np.stack(kept)), np.array(index, np.int64)
