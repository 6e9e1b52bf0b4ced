"""A network of a bundle: its files, whose runtime opens it, and what was done with it where it was built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from mtu_compile.bundle.kinds import Bytes, Milliseconds, Ratio, Share, Text
from mtu_compile.core import vendors
from mtu_compile.core.schema import Rule

#: Whose runtime opens a network; ``mtu_compile.runtime.engine`` has a class for each.
EngineKind = Annotated[str, Rule(lambda kind: kind in vendors.engines(), f"one of {', '.join(vendors.engines())}")]


class EngineState(Enum):
    """How far a network got on the build machine. Only what really ran there is ``MEASURED``."""

    MEASURED = "measured here"
    BUILT = "built, not run"
    AT_FIRST_USE = "to be compiled at first use"
    ON_BOARD = "to be built on the board"
    UNKNOWN = "not recorded"

    @property
    def ran(self) -> bool:
        """Whether the device itself ran it."""
        return self is EngineState.MEASURED


@dataclass(frozen=True)
class Estimate:
    """The toolchain's own figures about the device; never measured ones.

    Attributes:
        source: whose figures these are, in words.
        latency_ms: of one inference.
        compiler: version of the compiler that says so.
        dpu_mhz: clock it assumes.
        compatibility: what its engine asks of the device and its driver.
        int8_share_of_operations: of all multiply-adds, those in INT8.
        busy_ms: by processor of the device, how long it works.
        ms_by_type: by operation type and processor, milliseconds.
    """

    source: Text
    latency_ms: Milliseconds | None = None
    compiler: Text | None = None
    dpu_mhz: Ratio | None = None
    compatibility: Text | None = None
    int8_share_of_operations: Share | None = None
    busy_ms: Mapping[str, Milliseconds] = field(default_factory=dict)
    ms_by_type: Mapping[str, Mapping[str, Milliseconds]] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineRef:
    """A network inside the bundle: the portable graph, and beside it the engine if it was built in advance.

    Attributes:
        kind: which engine class opens it (``"openvino"``, ``"tensorrt"``, ``"tensorrt-rtx"``).
        path: the graph (an IR's ``.xml``, or ONNX), relative to the bundle.
        config: handed to the vendor runtime (``{"INFERENCE_PRECISION_HINT": "bf16"}``), and ``"device"``.
        prebuilt: engine or NPU blob made from the graph on the build machine, relative to the bundle.
        state: how far it got there.
        reason: why no further (``"no NVIDIA GPU on this machine"``).
        estimate: the toolchain's own figures about the device; never measured ones.
        weights: the file its weights lie in, relative to the bundle, where that serves other networks, too; ``None``
            where they lie in the graph, or beside it under its name.
        weights_bytes: how much of that file it reads.
    """

    kind: EngineKind
    path: Text
    config: Mapping[str, Text] = field(default_factory=dict)
    prebuilt: Text | None = None
    state: EngineState = EngineState.UNKNOWN
    reason: Text | None = None
    estimate: Estimate | None = None
    weights: Text | None = None
    weights_bytes: Bytes | None = None

    @property
    def state_in_words(self) -> str:
        """``"built, not run: no NVIDIA GPU on this machine"``."""
        return describe_state(self.state, self.reason)


def describe_state(state: EngineState, reason: str | None) -> str:
    """State and reason in one line."""
    return f"{state.value}: {reason}" if reason else state.value
