"""What a worker of a cluster does for a build: it sees whether it may, and runs a job in a process of its own."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mtu_compile.core import vendors
from mtu_compile.core.errors import MtuError
from mtu_compile.core.hashing import file_sha256, model_sha256
from mtu_compile.steps import key
from mtu_compile.steps.events import Told
from mtu_compile.steps.executors.child import Child, Died, held
from mtu_compile.steps.executors.memory import KEPT, resident
from mtu_compile.steps.perform import Job, perform
from mtu_compile.steps.store import Store

#: Distributions of which workers have to have the build's version; a step that depends on more says so when it is run.
TOOLS = (
    *("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "pillow"),
    *("onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnx-graphsurgeon", "openvino", "nncf", "polygraphy"),
)


@dataclass(frozen=True)
class Expected:
    """What a build expects of everybody who runs its steps, so that their results are its own, to the bit.

    Attributes:
        store: folder of the store.
        lease: file in it that the build holds a lock on for as long as it lives.
        code: hash of our source.
        python: version.
        tools: versions of distributions; ``None`` for one that is not installed.
        cpu: what decides the last bits of a sum (``steps.key.cpu``).
        environment: what of that is set by the environment.
        inputs: hashes of files and model folders from outside that steps read.
    """

    store: Path
    lease: Path
    code: str
    python: str
    tools: Mapping[str, str | None]
    cpu: Mapping[str, Any]
    environment: Mapping[str, str | None]
    inputs: Mapping[Path, str]

    @classmethod
    def of_this(cls, store: Store, inputs: Mapping[Path, str]) -> Expected:
        """What this process has, with ``store`` open."""
        tools = {name: key.tool_version(name) for name in (*TOOLS, *sorted(set(vendors.packages())))}
        environment = {name: os.environ.get(name) for name in (*key.INSTRUCTIONS, *key.THREADS)}
        return cls(
            *(store.root, store.lease, key.code_sha256(), platform.python_version()),
            *(tools, key.cpu(), environment, dict(inputs)),
        )


@dataclass(frozen=True)
class Unfit:
    """A worker must not run the build's steps, and why."""

    where: str
    why: tuple[str, ...]


@dataclass(frozen=True)
class Lost:
    """The process that ran a job on a worker was killed."""

    where: str


@dataclass(frozen=True)
class Done:
    """A job was run, or a worker may run jobs."""

    where: str


def look(expected: Expected) -> Done | Unfit:
    """Whether this worker may run the build's steps."""
    found = [*_unseen(expected), *_other_inputs(expected)]
    if not found:
        try:
            found = _own().of(expected).call(differences, expected)
        except Died as died:
            found = [f"cannot run Python in a process of its own (it ended with {died.args[0]})"]
        except MtuError as error:
            found = [error.message]
    return Unfit(called(), tuple(found)) if found else Done(called())


def perform_there(job: Job, events: Path, expected: Expected) -> Done | Unfit | Lost:
    """``perform`` on this worker, unless it is not fit for that; raises what the job does."""
    if found := [*_unseen(expected), *_other_inputs(expected)]:
        return Unfit(called(), tuple(found))
    Told(events).begin(job.title, called())
    try:
        kept, found = _own().of(expected).call(perform_if_fit, job, events, expected)
    except Died:
        return Lost(called())
    if kept > KEPT:
        _own().close()
    return Unfit(called(), tuple(found)) if found else Done(called())


def perform_if_fit(job: Job, events: Path, expected: Expected) -> tuple[int, list[str]]:
    """``perform`` in this process, and the bytes of memory it has then; or what is different here from the build."""
    found = differences(expected) or _other_tools(job.made_of["tools"])  # it may be newer than who was looked at
    if not found:
        perform(job, Told(events))
    return resident(), found


def differences(expected: Expected) -> list[str]:
    """What is different in this process from what a build expects."""
    found = []
    if key.code_sha256() != expected.code:
        found.append("has another version of mtu-compile's source")
    if platform.python_version() != expected.python:
        found.append(f"has Python {platform.python_version()}, not {expected.python}")
    found += _other_tools(expected.tools)
    found += _other_cpu(expected.cpu)
    return found


def _other_tools(tools: Mapping[str, str | None]) -> list[str]:
    here = {name: key.tool_version(name) for name in tools}
    return [f"has {name} {here[name] or 'not'}, not {tools[name]}" for name in tools if here[name] != tools[name]]


def _other_cpu(cpu: Mapping[str, Any]) -> list[str]:
    here = key.cpu()
    return [
        f"would compute other last bits: its CPU's {name} is {here[name]}, not {cpu[name]}"
        for name in cpu
        if here[name] != cpu[name]
    ]


def _unseen(expected: Expected) -> list[str]:
    if not expected.lease.exists() or not os.access(expected.store / "entries", os.W_OK):
        return [f"does not see the cache {str(expected.store)!r}, or cannot write there"]
    if not held(expected.lease):
        return [f"does not see locks of files in {str(expected.store)!r} that this machine holds"]
    return []


def _other_inputs(expected: Expected) -> list[str]:
    return [f"does not have {str(path)!r} as it is here" for path, sha in expected.inputs.items() if not _is(path, sha)]


@cache
def _is(path: Path, sha256: str) -> bool:
    """Whether a file, or a model's folder, has this content; looked at once by a worker."""
    try:
        return (model_sha256(path) if path.is_dir() else file_sha256(path)) == sha256
    except (OSError, MtuError):
        return False


class _Own:
    """The process that this worker runs the steps of one build in."""

    def __init__(self) -> None:
        self._for: Path | None = None
        self._child: Child | None = None

    def of(self, expected: Expected) -> Child:
        """It, for this build; another build may have been of other source."""
        if self._child is None or self._for != expected.lease or not self._child.alive:
            self.close()
            self._child, self._for = Child(expected.lease, expected.environment), expected.lease
        return self._child

    def close(self) -> None:
        """End it."""
        if self._child is not None:
            self._child.close()
            self._child = None


@cache
def _own() -> _Own:
    """This worker's; it stays from one job to the next."""
    return _Own()


def called() -> str:
    """What people find this worker by."""
    return f"the worker of process {os.getpid()} on {socket.gethostname()}"
