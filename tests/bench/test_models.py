"""What is measured of a multi-task network has tasks that differ, or a shared engine would have no routing left."""

from __future__ import annotations

from typing import Any

import torch

from bench.unet import tell_tasks_apart
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.model.experts import TaskExperts
from mtu_compile.model.upcycle import upcycle_unet


def test_tasks_of_random_weights_are_told_apart(tiny_unet: Any) -> None:
    unet = tell_tasks_apart(upcycle_unet(tiny_unet("sd15"), PAPER_TASKS))
    rows = torch.arange(len(PAPER_TASKS))
    blocks = [module for module in unet.modules() if isinstance(module, TaskExperts)]
    assert blocks
    for block in blocks:
        gates = block.router(unet.task_embedding(rows), rows)
        for table in (gates, block.norm.weight, block.norm.bias):
            assert (table[1:] - table[:1]).abs().amax(dim=tuple(range(1, table.dim()))).min() > 1e-3
