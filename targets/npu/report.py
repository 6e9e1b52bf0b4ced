"""What Intel's NPU compiler says about a network while it compiles it: its log, and the schedule it estimated.

All times are its cost model's for the NPU at its own frequency, taken on no device. The schedule
(``compileTimeScheduleTrace.json``, Chrome's trace format) is written with ``enable-schedule-trace=true``
(compiler 8.4, OpenVINO 2026.4.1).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: The name the compiler gives the schedule, in the folder it runs in.
TRACE_FILE = "compileTimeScheduleTrace.json"

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LATENCY = re.compile(r"Estimated inference latency: ([0-9.]+) us in dpu frequency ([0-9.]+) MHz")
_OPERATIONS = re.compile(r"Total number of (FP|INT)Ops: (\d+)")
_COMPILER = re.compile(r"Current compiler ID: (\S+)")
_COMPATIBILITY = re.compile(r"Blob compatibility string: '([^']*)'")
_ERROR = re.compile(r"\[ERROR\] [0-9:.]+ (.*)")
_STATISTIC = re.compile(r'^"([^"]+)":\s*([0-9.]+),?$')


#: Kinds of processors, computing ones first; the names are those of the fields below.
PROCESSORS = ("dpu", "shave", "dma")


@dataclass(frozen=True)
class Layer:
    """One layer of the schedule; layers overlap, and several processors work on one.

    The ``…_us`` are the parts of the whole latency it is answerable for, in microseconds; over all layers they add up
    to the time anything works. An instant belongs to the matrix engines (DPU) if one works, else to the vector
    processors (Shave), else to data movement (DMA), and is divided among the tasks that are on those then.

    Attributes:
        name: of the node in the IR.
        type: its operation ("Convolution"); "<Unknown>" for what the compiler added to run the schedule itself.
        start_us, span_us: from its first task to its last, pauses included.
    """

    name: str
    type: str
    start_us: float
    span_us: float
    dpu_us: float = 0.0
    shave_us: float = 0.0
    dma_us: float = 0.0


@dataclass(frozen=True)
class Busy:
    """For how long each kind of processor has work, in milliseconds of the whole inference.

    Attributes:
        dpu_ms: any matrix engine (convolutions, matrix products, additions).
        shave_ms: any vector processor (softmax, norms, activations).
        dma_ms: any data movement.
        dma_alone_ms: data movement while nothing computes: what is waited for.
    """

    dpu_ms: float
    shave_ms: float
    dma_ms: float
    dma_alone_ms: float


@dataclass(frozen=True)
class Report:
    """What the compiler said about one network.

    Attributes:
        compiler: its id.
        compatibility: what a driver has to understand to load the blob.
        latency_ms: its estimate of one inference.
        dpu_mhz: the frequency it is for.
        float_ops, int_ops: multiply-adds it counts, in floating point and in integers.
        busy: what the processors do meanwhile.
        layers: the schedule by layer, in order of start.
        errors: what its log calls an error.
    """

    compiler: str | None = None
    compatibility: str | None = None
    latency_ms: float | None = None
    dpu_mhz: float | None = None
    float_ops: int | None = None
    int_ops: int | None = None
    busy: Busy | None = None
    layers: tuple[Layer, ...] = ()
    errors: tuple[str, ...] = ()

    @property
    def int_share(self) -> float | None:
        """The part of all multiply-adds that runs in integers, 0 to 1."""
        total = (self.float_ops or 0) + (self.int_ops or 0)
        return (self.int_ops or 0) / total if total else None

    def ms_by_type(self) -> dict[str, dict[str, float]]:
        """Milliseconds of the latency by type of layer and processor, longest first."""
        sums: dict[str, dict[str, float]] = {}
        for layer in self.layers:
            one = sums.setdefault(layer.type, dict.fromkeys(PROCESSORS, 0.0))
            for processor in PROCESSORS:
                one[processor] += getattr(layer, f"{processor}_us") / 1e3
        return {name: sums[name] for name in sorted(sums, key=lambda name: -sum(sums[name].values()))}

    def summary(self) -> dict[str, Any]:
        """What a manifest carries of it."""
        found: dict[str, Any] = {
            "compiler": self.compiler,
            "dpu_mhz": self.dpu_mhz,
            "compatibility": self.compatibility,
        }
        if self.int_share is not None:
            found["int8_share_of_operations"] = round(self.int_share, 4)
        if self.busy is not None:
            found["busy_ms"] = {name.removesuffix("_ms"): round(ms, 3) for name, ms in asdict(self.busy).items()}
        if self.layers:
            found["ms_by_type"] = {
                name: {processor: round(ms, 3) for processor, ms in parts.items() if ms >= 0.001}
                for name, parts in self.ms_by_type().items()
                if sum(parts.values()) >= 0.001
            }
        return {name: value for name, value in found.items() if value is not None}


def read_report(log: str, trace: Path) -> Report:
    """Read the compiler's log and, if it is there, the schedule."""
    text = _COLOUR.sub("", log)
    latency, operations = _LATENCY.findall(text), dict(_OPERATIONS.findall(text))
    busy, layers = _read_trace(trace) if trace.is_file() else (None, ())
    return Report(
        compiler=_last(_COMPILER.findall(text)),
        compatibility=_last(_COMPATIBILITY.findall(text)),
        latency_ms=float(latency[-1][0]) / 1e3 if latency else None,
        dpu_mhz=float(latency[-1][1]) if latency else None,
        float_ops=int(operations["FP"]) if "FP" in operations else None,
        int_ops=int(operations["INT"]) if "INT" in operations else None,
        busy=busy,
        layers=layers,
        errors=log_errors(text),
    )


def log_errors(log: str) -> tuple[str, ...]:
    """The lines the compiler's log marks as errors, each once."""
    return tuple(dict.fromkeys(_ERROR.findall(_COLOUR.sub("", log))))


def _last(found: list[str]) -> str | None:
    return found[-1] if found else None


def _read_trace(path: Path) -> tuple[Busy | None, tuple[Layer, ...]]:
    """Read line by line: the file has a line an event, and of an SD 1.5 UNet fifty thousand events."""
    layers: list[Mapping[str, Any]] = []
    tasks: list[_Task] = []
    statistics: dict[str, float] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for raw in file:
            line = raw.strip().removesuffix(",")
            if '"ph":"X"' in line:
                event = json.loads(line)
                if event.get("cat") == "Layer":
                    layers.append(event)
                elif task := _task(event):
                    tasks.append(task)
            elif match := _STATISTIC.match(line):
                statistics[match[1]] = float(match[2]) / 1e3
    parts = _parts(tasks)
    names = ("DPU duration", "SW duration", "DMA duration", "DMA duration without overlaps")
    busy = Busy(*(statistics[name] for name in names)) if all(name in statistics for name in names) else None
    return busy, tuple(sorted((_layer(event, parts) for event in layers), key=lambda layer: layer.start_us))


def _layer(event: Mapping[str, Any], parts: Mapping[str, Mapping[str, float]]) -> Layer:
    name = str(event["name"])
    return Layer(
        name=name,
        type=str(event.get("args", {}).get("Layer type", "<Unknown>")),
        start_us=float(event["ts"]),
        span_us=float(event["dur"]),
        **{f"{processor}_us": round(part, 3) for processor, part in parts.get(name, {}).items()},
    )


@dataclass(frozen=True)
class _Task:
    """What one processor does for one layer without a pause."""

    layer: str
    processor: str
    start: float
    end: float


def _task(event: Mapping[str, Any]) -> _Task | None:
    name, begins, lasts = str(event["name"]), float(event["ts"]), float(event["dur"])
    # A task's variants repeat it; one of no length is a mark.
    if "/variant_" in name or lasts <= 0:
        return None
    processor = {"DPU": "dpu", "DMA": "dma"}.get(str(event.get("cat")), "shave")
    return _Task(name.partition("?t_")[0], processor, begins, begins + lasts)


def _parts(tasks: Iterable[_Task]) -> dict[str, dict[str, float]]:
    """By layer and processor, the microseconds of the latency they are answerable for (see ``Layer``)."""
    known = list(tasks)
    edges = sorted((at, i) for i, task in enumerate(known) for at in (task.start, task.end))
    active: dict[str, set[int]] = {processor: set() for processor in PROCESSORS}
    parts: dict[str, dict[str, float]] = {}
    before = 0.0
    for at, i in edges:
        first = next((name for name in PROCESSORS if active[name]), None)
        if first is not None and at > before:
            for one in active[first]:
                layer = parts.setdefault(known[one].layer, dict.fromkeys(PROCESSORS, 0.0))
                layer[first] += (at - before) / len(active[first])
        before = at
        active[known[i].processor] ^= {i}  # begins the first time, ends the second
    return parts
