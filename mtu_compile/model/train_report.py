"""``training.json``: what was trained, on what, for how long, and how the losses went."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from mtu_compile.core.version import __version__
from mtu_compile.model.train_config import TrainConfig


def training_report(
    config: TrainConfig, step: int, seconds: float, history: list[dict[str, Any]], record: Mapping[str, Any]
) -> dict[str, Any]:
    """``training.json``: what was trained, on what, for how long, and how the losses went."""
    return {
        "steps": step,
        "finished": step >= config.steps,
        "hours": round(seconds / 3600, 4),
        "losses": list(_thinned(history)),
        "hardware": _hardware(),
        "model_sha256": record["model_sha256"],
        "versions": {"mtu-compile": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "config": {k: v for k, v in config.to_json().items() if k not in {"model", "data", "output", "work"}},
    }


def _thinned(history: list[dict[str, Any]], points: int = 200) -> Iterator[dict[str, Any]]:
    """At most ``points`` means over equal stretches of the run: single steps are noisy."""
    stretch = max(1, math.ceil(len(history) / points))
    for start in range(0, len(history), stretch):
        part = history[start : start + stretch]
        means = {key: float(np.mean([row[key] for row in part])) for key in part[0] if key != "step"}
        yield {"step": part[-1]["step"], **means}


def _hardware() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": name, "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus}
