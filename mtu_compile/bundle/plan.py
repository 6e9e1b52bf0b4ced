"""What the planner expected of the device and of the build machine, as the manifest keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mtu_compile.bundle.kinds import Bytes, Count, Name, Seconds, Text
from mtu_compile.core.precision import Precision
from mtu_compile.core.routing import Routing


@dataclass(frozen=True)
class NetworkPlanRecord:
    """``mtu_compile.planner.NetworkPlan``: memory of one engine, estimated; ``"shared"`` is one for all tasks."""

    name: Text
    precision: Precision
    weights_bytes: Bytes
    activation_bytes: Bytes
    kind: Literal["task", "part", "shared"] | None = None
    attention_scores_bytes: Bytes | None = None
    unknown_shapes: Count | None = None


@dataclass(frozen=True)
class SuggestionRecord:
    """``mtu_compile.planner.Suggestion``: other options, and the memory they need."""

    options: Text
    needs_bytes: Bytes
    fits: bool


@dataclass(frozen=True)
class RecommendationRecord:
    """``mtu_compile.planner.Recommendation``: the form of routing that suits the device, and why."""

    routing: Routing
    reason: Text


@dataclass(frozen=True)
class HostRecord:
    """``mtu_compile.planner.HostPlan``: what the build needs of the machine it runs on, estimated."""

    picture: Text
    method: Text
    memory_bytes: Bytes
    available_bytes: Bytes | None
    libraries_bytes: Bytes | None = None
    weights_bytes: Bytes | None = None
    scores_bytes: Bytes | None = None
    features_bytes: Bytes | None = None
    smaller: Text | None = None
    seconds: Seconds | None = None
    fits: bool | None = None


@dataclass(frozen=True)
class PlanRecord:
    """``mtu_compile.planner.BuildPlan``: memory of a bundle on its device; every figure but the device's is estimated.

    Attributes:
        method: how it was estimated, in words.
        networks: the engines of a bundle with one for each task, tasks first.
        tasks: by task, what its engine needs with the parts and the workspace, as planned.
        together_bytes: all that is planned, resident.
        available_bytes: the device's memory without what is reserved; ``None`` if unknown.
        fits: whether all are resident at once; ``None`` if unknown.
        build: what the build itself needs.
        shared: one engine for all tasks, in the place of theirs; ``None`` where the UNet has no task input.
        static_bytes, shared_bytes: all resident, with an engine for each task and with one for all.
        routing: the form that was planned; ``None`` in manifests of version 1, which knew one form only.
        recommendation: the form that suits the device.
        disk_bytes: by form of routing, the UNets' graphs, weights that several have in common counted once.
    """

    method: Text
    networks: tuple[NetworkPlanRecord, ...]
    tasks: Mapping[str, Bytes]
    together_bytes: Bytes
    available_bytes: Bytes | None
    fits: bool | None
    target: Name | None = None
    precision: Precision | None = None
    workspace_bytes: Bytes | None = None
    reserved_bytes: Bytes | None = None
    device_bytes: Bytes | None = None
    shared: NetworkPlanRecord | None = None
    static_bytes: Bytes | None = None
    shared_bytes: Bytes | None = None
    routing: Routing | None = None
    recommendation: RecommendationRecord | None = None
    least_bytes: Bytes | None = None
    build: HostRecord | None = None
    suggestions: tuple[SuggestionRecord, ...] = ()
    disk_bytes: Mapping[Routing, Bytes] = field(default_factory=dict)
