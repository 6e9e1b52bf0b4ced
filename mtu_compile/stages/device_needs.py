"""What this build asks of its device: will the bundle fit it, in which form, and does its importer take the graphs?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mtu_compile.core.routing import RoutingChoice
from mtu_compile.planner import BuildPlan, HostPlan, Unet, survey
from mtu_compile.stages.contexts import task_context
from mtu_compile.stages.host_needs import with_time
from mtu_compile.stages.job import Model, Specialised, Workload
from mtu_compile.stages.on_target import OnTarget
from mtu_compile.steps import Steps, Work, step
from targets.base import Precision, Target


def device_needs(
    target: Target,
    precision: Precision,
    model: Model,
    dynamic: Path,
    parts: Mapping[str, Path],
    *,
    routing: RoutingChoice,
    memory: int | None,
    host: HostPlan,
    workload: Workload,
) -> BuildPlan:
    """The memory a bundle needs on ``target`` and the form of routing, and what the build needs of this machine.

    Nothing has to be specialised before: ``BuildPlan.routing`` says what to specialise.

    Args:
        model: what was exported.
        dynamic: its UNet, with the task as an input.
        parts: its other networks.
        routing: as asked for; ``"auto"`` follows the recommendation.
        memory: bytes the device has, or the machine whose memory it shares; asked of the target if not given.
        host: memory the build needs here.
        workload: how much it runs the UNet, which takes its time.

    Raises:
        ConfigError: one engine for all tasks of a plain UNet.
        PassError: the routing cannot be specialised; names the node.
    """
    unet = Unet(dynamic, {task.name: task_context(model, task) for task in model.tasks})
    planned = survey(target, precision, unet, parts, routing=routing, memory=memory)
    return replace(planned, host=with_time(host, precision, workload, model, unet, planned.routing))


def require_importable(
    steps: Steps, target: Target, precision: Precision, unets: Mapping[str, Specialised], parts: Mapping[str, Path]
) -> None:
    """``BuildError``, before anything is built, for a graph that the target's importer does not take."""
    here = OnTarget.of(target)
    graphs = {unet.label: unet.graph for unet in unets.values()} | dict(parts)
    steps.run_all([importable.of(f"import {name}", here, precision, graph) for name, graph in graphs.items()])


@step(tools=("onnx", "onnx-ir"))
def importable(work: Work, here: OnTarget, precision: Precision, graph: Path) -> None:
    """``BuildError`` unless the target's importer takes ``graph``."""
    here.target.check_graph(graph, precision=precision)
