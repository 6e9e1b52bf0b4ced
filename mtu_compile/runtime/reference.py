"""What the float original did on a few real inputs, recorded so that a bundle can be checked anywhere.

A reference holds, for one task, whole denoising trajectories: the UNet's inputs and outputs at every step, the initial
noise, the final latent and the picture. It is one safetensors file; pictures are stored as uint8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtu_compile.bundle.kinds import Seed, Steps, Text
from mtu_compile.core.errors import BundleError, MtuError
from mtu_compile.core.schema import conform, parse_json
from mtu_compile.core.tensor_files import order_metadata

FORMAT = "mtu-reference-1"

#: A trajectory's pictures, by the name of their field; all but the first may be absent.
PICTURES = ("picture", "image", "mask", "target")


@dataclass(frozen=True)
class Trajectory:
    """One picture made by the float original.

    Attributes:
        prompt, seed: what was asked for.
        image, mask: source picture (RGB) and mask (L) of the task's condition, or ``None``.
        inputs: for each step, the static graph's inputs by name.
        outputs: [steps, b, 4, h, w], the UNet's output at each step.
        noise: [1, 4, h, w], standard normal, before the sampler scales it.
        latents: [1, 4, h, w], after the last step.
        picture: the decoded picture, before anything is pasted back.
        target: the wanted picture, of ``picture``'s size, where the data have one.
    """

    prompt: str
    seed: int
    image: Image.Image | None
    mask: Image.Image | None
    inputs: Sequence[Mapping[str, NDArray[np.float32]]]
    outputs: NDArray[np.float32]
    noise: NDArray[np.float32]
    latents: NDArray[np.float32]
    picture: Image.Image
    target: Image.Image | None = None

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(float(step["timestep"][0]) for step in self.inputs)


@dataclass(frozen=True)
class Reference:
    """The recorded trajectories of one task.

    ``producer`` says what made them, e.g. ``"torch 2.13.0 float32, dynamic routing"``.
    """

    task: str
    steps: int
    producer: str
    trajectories: tuple[Trajectory, ...]

    def calls(self, most: int) -> list[tuple[Mapping[str, NDArray[np.float32]], NDArray[np.float32], float]]:
        """(inputs, output, timestep) of up to ``most`` UNet calls, spread evenly over all trajectories."""
        every = [call for one in self.trajectories for call in zip(one.inputs, one.outputs, one.timesteps, strict=True)]
        chosen = sorted({round(i) for i in np.linspace(0, len(every) - 1, min(most, len(every)))})
        return [every[i] for i in chosen]

    def save(self, path: Path) -> None:
        """Write one safetensors file; the same bytes for the same reference."""
        tensors: dict[str, NDArray[np.generic]] = {}
        described = []
        for i, one in enumerate(self.trajectories):
            described.append({"prompt": one.prompt, "seed": one.seed})
            for name in one.inputs[0]:
                tensors[f"{i}.input.{name}"] = np.ascontiguousarray(np.stack([step[name] for step in one.inputs]))
            tensors[f"{i}.output"] = np.ascontiguousarray(one.outputs)
            tensors[f"{i}.noise"], tensors[f"{i}.latents"] = one.noise, one.latents
            for key in PICTURES:
                if (picture := getattr(one, key)) is not None:
                    tensors[f"{i}.{key}"] = np.ascontiguousarray(picture)
        head = {"task": self.task, "steps": self.steps, "producer": self.producer}
        save_file(tensors, path, {"format": FORMAT, "head": json.dumps(head), "trajectories": json.dumps(described)})
        order_metadata(path)

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read a file written by ``save``; ``BundleError`` if it is not one, or has NaN or Inf values."""
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise BundleError(f"{path.name} is not a reference of this version")
                head = conform(_Head, parse_json(metadata["head"], strict_keys=True), "head")
                described = conform(
                    tuple[_Asked, ...], parse_json(metadata["trajectories"], strict_keys=True), "trajectories"
                )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            trajectories = tuple(_trajectory(tensors, i, one) for i, one in enumerate(described))
        except BundleError:
            raise
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, MtuError) as error:
            # KeyError: a tensor is not there; TypeError: of a type that numpy has not
            raise BundleError(
                f"reference {path.name} cannot be read: {error}", hint="build the bundle again"
            ) from error
        for name, array in tensors.items():
            if not np.isfinite(array).all():
                raise BundleError(
                    f"reference {path.name} has NaN or Inf values in {name!r}", hint="build the bundle again"
                )
        return cls(head.task, head.steps, head.producer, trajectories)


@dataclass(frozen=True)
class _Head:
    """What a file says of itself."""

    task: Text
    steps: Steps
    producer: Text


@dataclass(frozen=True)
class _Asked:
    """What was asked for in one trajectory."""

    prompt: str
    seed: Seed


def _trajectory(tensors: Mapping[str, NDArray[np.generic]], i: int, asked: _Asked) -> Trajectory:
    """One trajectory; ``KeyError`` or ``ValueError`` if its tensors are not there or do not fit each other."""
    outputs = _tensor(tensors, f"{i}.output", (None, None, None, None, None))
    steps = len(outputs)
    prefix = f"{i}.input."
    inputs = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    if inputs["timestep"].ndim != 2 or inputs["timestep"].size == 0:
        raise ValueError(f"{prefix}timestep is {list(inputs['timestep'].shape)}")
    for name, array in inputs.items():
        if array.ndim == 0 or len(array) != steps or array.dtype not in (np.float32, np.int64):
            raise ValueError(f"{prefix}{name} is {array.dtype} {list(array.shape)}, and there are {steps} steps")
    pictures = {key: _picture(tensors, f"{i}.{key}") for key in PICTURES if f"{i}.{key}" in tensors}
    return Trajectory(
        prompt=asked.prompt,
        seed=asked.seed,
        image=pictures.get("image"),
        mask=pictures.get("mask"),
        inputs=[{name: array[step] for name, array in inputs.items()} for step in range(steps)],
        outputs=outputs,
        noise=_tensor(tensors, f"{i}.noise", (1, None, None, None)),
        latents=_tensor(tensors, f"{i}.latents", (1, None, None, None)),
        picture=pictures["picture"],
        target=pictures.get("target"),
    )


def _tensor(
    tensors: Mapping[str, NDArray[np.generic]], name: str, shape: tuple[int | None, ...]
) -> NDArray[np.float32]:
    """A float32 tensor of a shape, of which ``None`` is any size of at least 1."""
    array = tensors[name]
    fits = array.ndim == len(shape) and all(
        size >= 1 and wanted in (None, size) for size, wanted in zip(array.shape, shape, strict=True)
    )
    if not fits or array.dtype != np.float32:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}")
    return array  # type: ignore[return-value]


def _picture(tensors: Mapping[str, NDArray[np.generic]], name: str) -> Image.Image:
    """[H, W] or [H, W, 3] uint8 as a picture, grey or RGB."""
    array = tensors[name]
    if array.dtype != np.uint8 or array.shape[2:] not in ((), (3,)) or array.ndim < 2 or array.size == 0:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, and no picture")
    return Image.fromarray(array)
