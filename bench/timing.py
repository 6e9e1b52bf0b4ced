"""Interleaved timing: every candidate once a round, so that a machine that drifts drifts for all of them."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

RESULTS = Path("build/bench")


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate over all rounds, and the median of its ratio to the first candidate, round by round."""

    median: float
    least: float
    most: float
    ratio: float


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, Timing]:
    """Time each candidate ``rounds`` times in turn; the first one is what the others are compared with.

    Every round begins with another candidate: one that always ran behind the slowest would find the machine as that
    one leaves it.
    """
    for _ in range(warm_up):
        for run in candidates.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    for turn in range(rounds):
        for name, run in order[turn % len(order) :] + order[: turn % len(order)]:
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(seconds.values()))
    return {
        name: Timing(median(taken), min(taken), max(taken), median(a / b for a, b in zip(taken, first, strict=True)))
        for name, taken in seconds.items()
    }


def openvino_runner(path: Path, precision: str, batch: Mapping[str, np.ndarray[Any, Any]]) -> Callable[[], object]:
    """One inference of a graph on the CPU; ``precision`` is OpenVINO's ``INFERENCE_PRECISION_HINT``."""
    import openvino

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": precision})
    names = {name for port in compiled.inputs for name in port.names}
    feed = {name: value for name, value in batch.items() if name in names}
    request = compiled.create_infer_request()
    return lambda: request.infer(feed)


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    from importlib.metadata import version

    import openvino

    core = openvino.Core()
    return {
        "cpu": str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip(),
        "capabilities": " ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        "threads": str(core.get_property("CPU", "INFERENCE_NUM_THREADS")) or "auto",
        "python": platform.python_version(),
        "openvino": version("openvino"),
    }


def read(path: Path) -> dict[str, Any]:
    """Figures that were kept; none if there are none."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def write(name: str, results: Mapping[str, object], *, quiet: bool = False) -> Path:
    """Keep the figures as JSON and print them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    data = {"machine": machine(), **results}
    path.write_text(json.dumps(data, indent=2, default=lambda o: asdict(o)) + "\n")
    if not quiet:
        print(path.read_text())
    return path
