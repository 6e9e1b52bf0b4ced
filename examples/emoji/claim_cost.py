"""What the networks of ``claim`` cost: parameters, operations and the time of a UNet call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mtu_compile.core.tasks import Task
from mtu_compile.model.recipe import trained_parameters
from mtu_compile.model.upcycle import upcycle_unet

BATCH = 16
ROUNDS = 40


def measure(base: UNet2DConditionModel, tasks: Sequence[Task], routing: Mapping[str, int]) -> dict[str, Any]:
    """By network: parameters, those that are trained, multiply-adds × 2 of one sample, and milliseconds of a call.

    A call takes ``BATCH`` samples of the last task, in bf16 autocast, routed dynamically; on a GPU as a CUDA graph. The
    median of ``ROUNDS`` rounds, in each of which every network has its turn.
    """
    device, last = base.device, len(tasks) - 1
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], object]] = {}
    plain = [("pretrained", base, None)]
    multi = [(f"{n} experts", upcycle_unet(base, tasks, num_experts=n, **routing), last) for n in (1, 2, 4, 8)]
    single = [("single task", upcycle_unet(base, [tasks[last]], num_experts=1, **routing), 0)]
    for name, unet, task in (*plain, *single, *multi):
        unet = unet.eval()
        channels = unet.config.in_channels if task is None else unet.sample_channels
        sample = torch.randn(BATCH, channels, unet.config.sample_size, unet.config.sample_size, device=device)
        inputs = (
            sample,
            torch.full((BATCH,), 500, device=device),
            torch.randn(BATCH, 32, unet.config.cross_attention_dim, device=device),
        )
        more = {} if task is None else {"task_ids": torch.full((BATCH,), task, device=device)}

        def call(unet: nn.Module = unet, inputs: Any = inputs, more: Any = more) -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                unet(*inputs, **more, return_dict=False)

        with FlopCounterMode(display=False) as counter:
            call()
        found[name] = {
            "parameters": sum(p.numel() for p in unet.parameters()),
            "trained": 0 if task is None else sum(p.numel() for p in trained_parameters(unet).values()),
            "flops": counter.get_total_flops() / BATCH,
        }
        calls[name] = _recorded(call) if device.type == "cuda" else call
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            times[name].append(1e3 * (time.perf_counter() - began))
    for name, values in times.items():
        found[name]["milliseconds"] = statistics.median(values)
    return {"batch": BATCH, "networks": found}


def _recorded(call: Callable[[], None]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(inputs_of: Callable[[], None] = call) -> None:  # the graph reads the call's own tensors
        graph.replay()

    return replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
