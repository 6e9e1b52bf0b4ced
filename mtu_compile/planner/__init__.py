"""Whether a model will fit a device, before anything is built.

Weights, activations and workspace of every network a bundle carries are estimated from the float graphs (see
``targets.costs.estimate``) and held against the device's memory: for each task beside the text encoder and the
autoencoder, and for all tasks together, because the runtime keeps every engine it has opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mtu_compile.planner.graphs import Survey
from mtu_compile.planner.host import HostPlan
from mtu_compile.planner.plan import COLUMNS, METHOD, BuildPlan, NetworkPlan, Suggestion
from targets.base import Precision, Target

__all__ = ["COLUMNS", "METHOD", "BuildPlan", "HostPlan", "NetworkPlan", "Suggestion", "survey"]


def survey(
    target: Target,
    precision: Precision,
    graphs: Mapping[str, Path],
    parts: Mapping[str, Path],
    *,
    dynamic: Path | None = None,
    memory: int | None = None,
) -> BuildPlan:
    """Estimate the memory a bundle needs on ``target``; needs no toolchain and reads no weights.

    Args:
        target: the device.
        precision: what the UNets will be built in.
        graphs: by task, its static float graph.
        parts: the other networks (text encoder, autoencoder), float.
        dynamic: the UNet with the task as an input. Without it nothing is said about other sizes, or one engine for
            all tasks.
        memory: bytes the device has, or the machine whose memory it shares; asked of the target if not given.

    Raises:
        ConfigError: a precision the target does not know.
        ModelError: a file that is no ONNX graph.
        ToolchainMissing: the target needs its toolchain to choose the precision of the parts, and it is not here.
    """
    target.spec.check_precision(precision)
    return Survey(target, precision, graphs, parts, dynamic, memory).plan()
