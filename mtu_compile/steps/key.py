"""The key of a result: everything that it was made of, as JSON, and the hash of that."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mtu_compile.core.hashing import file_sha256
from mtu_compile.steps.step import Call

#: Metadata of a dataclass's field that says nothing of what the whole is, as where a row was read from.
NOT_CONTENT: Mapping[str, Any] = {"not content": True}

#: Our own packages: another version of any module may give another result.
PACKAGES = ("mtu_compile", "passes", "calibration", "targets")
#: Packages in them that only show results.
_SHOWING = frozenset({"cli", "report"})

#: What is set in the environment and changes by which instructions numbers are added up, and by how many threads.
INSTRUCTIONS = (
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("OPENBLAS_CORETYPE", "ONEDNN_DEFAULT_FPMATH_MODE"),
)
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Identify = Callable[[Path], str]


def made_of(call: Call[Any], identify: Identify) -> dict[str, Any]:
    """What the result of ``call`` depends on, as JSON; ``identify`` gives a file's identity, which is its content's."""
    return {
        "step": ".".join(call.step.place),
        "given": {name: plain(value, identify) for name, value in call.given.items()},
        "code": code_sha256(),
        "tools": {tool: tool_version(tool) for tool in call.step.tools},
        "cpu": cpu() if call.step.cpu else None,
    }


def digest(content: Any) -> str:
    """SHA-256 of JSON data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plain(value: Any, identify: Identify) -> Any:
    """A value as JSON that differs where the value does.

    Raises:
        TypeError: a value of a kind whose content is not known: it would be the same key for different things.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, Path):
        return {"file": identify(value)}
    if isinstance(value, Enum):
        return {type(value).__name__: plain(value.value, identify)}
    if isinstance(value, Image.Image):
        return {"picture": [value.mode, *value.size, hashlib.sha256(value.tobytes()).hexdigest()]}
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
        return {"array": [value.dtype.str, *value.shape, content]}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {one.name: getattr(value, one.name) for one in fields(value) if "not content" not in one.metadata}
        return {type(value).__name__: {name: plain(part, identify) for name, part in parts.items()}}
    if isinstance(value, Mapping):  # its order may matter
        return {"mapping": [[plain(key, identify), plain(part, identify)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return [plain(part, identify) for part in value]
    if isinstance(value, (set, frozenset)):
        return {"set": sorted(json.dumps(plain(part, identify)) for part in value)}
    raise TypeError(f"a step cannot be given a {type(value).__qualname__}: nothing says what is in it")


@cache
def code_sha256() -> str:
    """Hash of our own source, but for what only shows results."""
    lines = []
    for name in PACKAGES:
        root = Path(str(import_module(name).__file__)).parent
        for path in sorted(root.rglob("*")):
            relative = path.relative_to(root)
            if path.suffix in (".py", ".c") and relative.parts[0] not in _SHOWING:
                lines.append(f"{file_sha256(path)}  {name}/{relative.as_posix()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tool_version(tool: str) -> str | None:
    """Version of a distribution; ``None`` where it is not installed."""
    try:
        return version(tool)
    except PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """What of this machine's CPU, and of how it is used, decides the last bits of a result, and its times."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get(THREADS[0], str(cores))  # the others follow the first unless they are told
    return {
        "model": _model(),
        "machine": platform.machine(),
        "cores": cores,
        "instructions": {name: os.environ[name] for name in INSTRUCTIONS if name in os.environ},
        "threads": {name: os.environ.get(name, threads) for name in THREADS},
    }


@cache
def _model() -> str:
    """The CPU's name and what it can do, as Linux has it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    told = dict(line.split(":", 1) for line in reversed(text.splitlines()) if ":" in line)
    named = {name.strip(): value.strip() for name, value in told.items()}
    kept = ("model name", "stepping", "flags", "CPU implementer", "CPU part", "Features")
    return digest({name: named.get(name) for name in kept})[:16] + f" {named.get('model name', platform.processor())}"
