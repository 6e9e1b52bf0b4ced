"""What this build asks of this machine: its options and its model, put to ``mtu_compile.planner.host``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from calibration.mixed import Effort
from mtu_compile.core.tasks import Task
from mtu_compile.planner.host import WEIGHTS, HostPlan, plan_host, rough_seconds
from mtu_compile.stages.job import BuildOptions, Graphs
from mtu_compile.stages.precision import QUANTISED
from targets.costs.roofline import multiply_adds

if TYPE_CHECKING:
    from mtu_compile.model.pipeline import MTUPipeline

#: UNet calls a calibration set keeps of each picture (``calibration.capture.CALLS``), which NNCF runs, and what such a
#: call costs for the ranges that are collected beside it.
_KEPT_CALLS, _RANGES = 10, 1.5
#: UNet calls two backends are compared on, and runs of each check trajectory: the original's, the compared, the made.
_PARITY_CALLS, _CHECKED = 12, 3
#: What a call costs while layers are measured one by one: what comes before a layer is run once (docs/benchmarks.md).
_MEASURED = 0.5


def host_needs(options: BuildOptions, pipeline: MTUPipeline, tasks: Sequence[Task], size: tuple[int, int]) -> HostPlan:
    """The memory a build needs of this machine, before anything is exported."""
    weights = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    unet, vae = dict(pipeline.unet.config), dict(pipeline.vae.config)
    return plan_host(unet, vae, tasks, size, weights, memory=options.build_memory)


def with_time(host: HostPlan, options: BuildOptions, graphs: Graphs) -> HostPlan:
    """``host`` with the time a build takes, from the operations of its graphs."""
    layers = {name: multiply_adds(graph) for name, graph in graphs.unets.items()}
    weights = int(host.weights_bytes / WEIGHTS)
    calls = {name: _calls(options, len(found), weights // 4) for name, found in layers.items()}
    return replace(host, seconds=rough_seconds({name: sum(one) for name, one in layers.items()}, calls, weights))


def _calls(options: BuildOptions, layers: int, weights: int) -> float:
    """How many UNet calls of one task a build makes, those of less work counted less."""
    calls = float(options.check_pictures * options.steps * _CHECKED + _PARITY_CALLS)
    if options.precision in QUANTISED:
        calls += options.calibration_pictures * (options.steps + min(options.steps, _KEPT_CALLS) * _RANGES)
    if options.precision == "int8" and options.mixed and options.quant_config is None:
        effort = Effort.of(weights)
        calls += effort.check_calls + layers * effort.calls * _MEASURED
    return calls
