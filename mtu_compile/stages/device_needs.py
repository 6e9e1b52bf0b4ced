"""What this build asks of its device: will the bundle fit it, and does its importer take the graphs?"""

from __future__ import annotations

from dataclasses import replace

from mtu_compile.planner import BuildPlan, HostPlan, survey
from mtu_compile.stages.host_needs import with_time
from mtu_compile.stages.job import Graphs, Workload
from targets.base import Precision, Target


def device_needs(
    target: Target, precision: Precision, graphs: Graphs, memory: int | None, host: HostPlan, workload: Workload
) -> BuildPlan:
    """The memory a bundle needs on ``target``, and beside it what the build needs of this machine.

    Args:
        memory: bytes the device has, or the machine whose memory it shares; asked of the target if not given.
        host: memory the build needs here.
        workload: how much it runs the UNet, which takes its time.
    """
    planned = survey(target, precision, graphs.unets, graphs.parts, dynamic=graphs.dynamic, memory=memory)
    return replace(planned, host=with_time(host, precision, workload, graphs))


def require_device(target: Target, precision: Precision, graphs: Graphs, planned: BuildPlan) -> None:
    """Refuse, before anything is built, what cannot be.

    Raises:
        BuildError: a bundle that does not fit, or a graph that the target's importer does not take.
        ConfigError: nobody knows how much memory the device has, and it matters.
    """
    planned.require()
    for graph in (*graphs.unets.values(), *graphs.parts.values()):
        target.check_graph(graph, precision=precision)
