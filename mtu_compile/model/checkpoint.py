"""Training checkpoints: safetensors and JSON, hashed, written atomically, never pickles."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtu_compile.core.atomic import staging
from mtu_compile.core.errors import ModelError
from mtu_compile.core.hashing import file_sha256

STATE = "state.json"
PREFIX = "checkpoint-"
PARTS = ("weights", "ema", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
        step: steps done.
        weights: trained parameters by name.
        ema: their exponential moving averages, same names.
        optimizer: ``<parameter>/<slot>`` → tensor, e.g. ``task_embedding.weight/exp_avg``.
        record: JSON-able rest (the run's settings, its losses so far, time spent).
    """

    step: int
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    record: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write ``folder/checkpoint-<step>`` and drop all but the last ``keep`` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    destination = folder / f"{PREFIX}{checkpoint.step:07d}"
    with staging(destination, replace=True, marker=STATE) as place:
        hashes = {}
        for part in PARTS:
            path = place / f"{part}.safetensors"
            tensors = {name: value.detach().cpu().contiguous() for name, value in getattr(checkpoint, part).items()}
            save_file(tensors, path)
            hashes[path.name] = file_sha256(path)
        state = {"step": checkpoint.step, "files": hashes, "record": dict(checkpoint.record)}
        state = {**state, "sha256": _digest(state)}
        (place / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
    for old in found(folder)[:-keep]:
        shutil.rmtree(old)
    return destination


def found(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and check every byte of it.

    Raises:
        ModelError: naming the file that is missing or damaged.
    """
    state = _state(path / STATE)
    parts = {}
    for part in PARTS:
        file = path / f"{part}.safetensors"
        try:
            if file_sha256(file) != state["files"].get(file.name):
                raise _damaged(file, "its content has changed")
            parts[part] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise _damaged(file, str(error)) from error
    return Checkpoint(step=int(state["step"]), record=state["record"], **parts)


def _state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        recorded = state.pop("sha256")
        intact = recorded == _digest(state) and isinstance(state["files"], dict)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(file, str(error)) from error
    if not intact:
        raise _damaged(file, "its content has changed")
    assert isinstance(state, dict)
    return state


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damaged(file: Path, why: str) -> ModelError:
    return ModelError(
        f"checkpoint file {file} is damaged: {why}", hint=f"delete {file.parent} to resume from the one before"
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """State tensors of ``optimizer`` as ``<parameter>/<slot>``; ``names`` is ``id(parameter)`` → name."""
    return {
        f"{names[id(parameter)]}/{slot}": torch.as_tensor(value)
        for parameter, slots in optimizer.state.items()
        for slot, value in slots.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    """Undo ``optimizer_tensors``."""
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        parameter = parameters[name]
        # The step counter is a scalar, kept where the optimizer put it; moments live beside their parameter.
        optimizer.state[parameter][slot] = value.to(parameter.device) if value.dim() else value.clone()
