"""Whether a model will fit a device, and in which form of routing, before anything is built.

Weights, activations and workspace of every network a bundle carries are estimated from the float graphs (see
``targets.costs.estimate``) and held against the device's memory, for both forms: an engine for each task, which the
runtime keeps once it has opened it, and one engine for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mtu_compile.core.routing import RoutingChoice
from mtu_compile.planner.graphs import Survey
from mtu_compile.planner.host import HostPlan
from mtu_compile.planner.plan import ALL_TASKS, COLUMNS, METHOD, BuildPlan, NetworkPlan, Suggestion
from mtu_compile.planner.routing import Recommendation, recommend
from mtu_compile.planner.unet import Unet
from targets.base import Precision, Target

__all__ = [
    "ALL_TASKS",
    "COLUMNS",
    "METHOD",
    "BuildPlan",
    "HostPlan",
    "NetworkPlan",
    "Recommendation",
    "Suggestion",
    "Unet",
    "recommend",
    "survey",
]


def survey(
    target: Target,
    precision: Precision,
    unet: Unet,
    parts: Mapping[str, Path],
    *,
    routing: RoutingChoice = "auto",
    memory: int | None = None,
) -> BuildPlan:
    """Estimate the memory a bundle needs on ``target``; needs no toolchain and reads no weights.

    Args:
        target: the device.
        precision: what the UNets will be built in.
        unet: the exported UNet and its tasks; nothing of it need be specialised before.
        parts: the other networks (text encoder, autoencoder), float.
        routing: the form to plan; ``"auto"`` is the one that is recommended.
        memory: bytes the device has, or the machine whose memory it shares; asked of the target if not given.

    Raises:
        ConfigError: a precision the target does not know, or one engine for all tasks of a UNet that has no task input.
        ModelError: a file that is no ONNX graph.
        PassError: routing that cannot be specialised; names the node.
        ToolchainMissing: the target needs its toolchain to choose the precision of the parts, and it is not here.
    """
    target.spec.check_precision(precision)
    return Survey(target, precision, unet, parts, routing, memory).plan()
