"""What this build asks of this machine: its model and its amount of work, put to ``mtu_compile.planner.host``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from calibration.mixed import Effort
from mtu_compile.core.precision import QUANTISED
from mtu_compile.core.routing import Routing
from mtu_compile.planner.host import HostPlan, plan_host, rough_seconds
from mtu_compile.planner.unet import Unet
from mtu_compile.stages.job import Model, Workload
from targets.base import Precision, Target
from targets.costs.roofline import multiply_adds

#: UNet calls a calibration set keeps of each picture (``calibration.capture.CALLS``), which NNCF runs, and what such a
#: call costs for the ranges that are collected beside it.
_KEPT_CALLS, _RANGES = 10, 1.5
#: UNet calls two backends are compared on, and runs of each check trajectory: the original's, the compared, the made.
_PARITY_CALLS, _CHECKED = 12, 3
#: Runs of each call that choices of layers are checked on (float, all INT8, the choice), and of each that the layers'
#: errors are estimated on, beside one for each pass backward: forward, and forward again with every layer in INT8, too.
_CHOSEN, _ESTIMATED = 3, 3


def host_needs(model: Model, memory: int | None, asked: Iterable[tuple[Target, Precision]]) -> HostPlan:
    """The memory a build needs of this machine, before anything is exported.

    Args:
        memory: bytes it may use, instead of what this machine has.
        asked: what is built, one after the other.
    """
    pipeline = model.pipeline
    others = sum(map(_numbers, (pipeline.vae, *(encoder for _, encoder in pipeline.texts.branches()))))
    configs = dict(pipeline.unet.config), dict(pipeline.vae.config)
    stand_in = max(target.stand_in(precision) for target, precision in asked)
    return plan_host(
        *configs, model.tasks, model.size, _numbers(pipeline.unet), others, memory=memory, stand_in=stand_in
    )


def _numbers(network: Any) -> int:
    """Weights of a torch module."""
    return sum(parameter.numel() for parameter in network.parameters())


def with_time(
    host: HostPlan, precision: Precision, workload: Workload, model: Model, unet: Unet, routing: Routing = "static"
) -> HostPlan:
    """``host`` with the time a build takes, from the operations of its tasks' graphs."""
    together = len(unet.tasks) if routing == "shared" else 1
    layers = {name: multiply_adds(unet.static(name)) for name in unet.tasks}
    weights = _numbers(model.pipeline.unet)
    calls = dict.fromkeys(layers, _calls(precision, workload, weights, together))
    return replace(host, seconds=rough_seconds({name: sum(one) for name, one in layers.items()}, calls, 4 * weights))


def _calls(precision: Precision, workload: Workload, weights: int, together: int) -> float:
    """How many UNet calls of one task a build makes, those of less work counted less; ``together``: tasks a network."""
    calls = float(workload.check_pictures * workload.steps * _CHECKED + _PARITY_CALLS)
    if precision in QUANTISED:
        kept = min(workload.steps, _KEPT_CALLS)
        calls += workload.calibration_pictures * (workload.steps + kept * _RANGES)
    if precision == "int8" and workload.search:
        effort = Effort.of(weights).split(together)
        calls += effort.check_calls * _CHOSEN + effort.calls * (effort.probes + _ESTIMATED)
    return calls
