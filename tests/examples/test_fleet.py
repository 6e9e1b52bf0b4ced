"""A fleet of networks is its networks: the same outputs, and the same weights after the same training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from examples.emoji.gpu.fleet import Fleet, Network
from examples.emoji.gpu.loop import CLIP, Group, fit
from mtu_compile.core.tasks import Task
from mtu_compile.model.recipe import trained_parameters
from mtu_compile.model.unet import MTUUNet2DConditionModel

TASKS = [Task.from_json(row) for row in json.loads(Path("examples/emoji/tasks.json").read_text())]
NETWORKS = [
    Network("four experts", 0, (0, 1, 2, 3), 4),
    Network("single task", 0, (1,), 1),
    Network("single task", 1, (3,), 1),
    Network("two experts", 1, (0, 1, 2, 3), 2),
    Network("one norm", 0, (0, 1, 2, 3), 4, shared_norms=True),
    Network("no routing", 0, (0, 1, 2, 3), 4, uniform=True),
]
SIZE = 2


@pytest.fixture(scope="module")
def base() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def fleet_of(base: UNet2DConditionModel) -> Fleet:
    return Fleet(base, TASKS, NETWORKS, d_task=8, router_width=8)


def inputs(fleet: Fleet, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Samples for every cell; condition channels that its task lacks are zero, as data are."""
    drawn = torch.Generator().manual_seed(seed)
    sample = torch.randn(len(fleet.cells), SIZE, 9, 8, 8, generator=drawn)
    for cell, task in enumerate(fleet.cells.task.tolist()):
        sample[cell, :, 4 + TASKS[task].condition_channels(4) :] = 0
    states = torch.randn(len(fleet.cells) * SIZE, 5, 16, generator=drawn)
    return sample.flatten(0, 1), torch.randint(1000, (len(states),), generator=drawn), states


def perturb(fleet: Fleet) -> None:
    """Away from the start, where every network is the pretrained one."""
    drawn = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in fleet.parts.values():
            for parameter in part.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=drawn)
        conv = fleet.parts["task_conv_in"]
        for cell, task in enumerate(fleet.cells.task.tolist()):
            network, row = fleet.cells.network[cell], fleet.cells.row[cell]
            conv.weight[network, row, :, 4 + TASKS[task].condition_channels(4) :] = 0


def of(cells: list[int], tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (-1, SIZE))[cells].flatten(0, 1)


def alone(fleet: Fleet, index: int, model: MTUUNet2DConditionModel, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    cells = (fleet.cells.network == index).nonzero()[:, 0].tolist()
    sample, t, states = (of(cells, one) for one in given)
    ids = torch.arange(len(cells)).repeat_interleave(SIZE)
    return model(sample[:, : model.sample_channels], t, states, task_ids=ids, return_dict=False)[0]


def test_every_network_of_a_fleet_is_the_model_it_stands_for(base: UNet2DConditionModel) -> None:
    fleet = fleet_of(base)
    perturb(fleet)
    given = inputs(fleet)
    everything = torch.arange(len(fleet.cells))
    together = fleet.unet(*given, task_ids=everything, return_dict=False)[0]
    for index in range(len(NETWORKS)):
        cells = (fleet.cells.network == index).nonzero()[:, 0].tolist()
        wanted = alone(fleet, index, fleet.network(index), given)
        torch.testing.assert_close(of(cells, together), wanted, rtol=1e-4, atol=1e-4)
        some = fleet.unet(*(of(cells, one) for one in given), task_ids=torch.tensor(cells), return_dict=False)[0]
        torch.testing.assert_close(some, wanted, rtol=1e-4, atol=1e-4)
    apart = [of(fleet.cells_of(1)[i : i + 1], together) for i in range(2)]
    assert (apart[0] - apart[1]).abs().max() > 0.01


def test_training_in_lock_step_is_training_each_alone(base: UNet2DConditionModel) -> None:
    fleet = fleet_of(base)
    start = [fleet.network(i) for i in range(len(NETWORKS))]
    given = inputs(fleet, 1)
    target = inputs(fleet, 2)[0][:, :4]
    everything = torch.arange(len(fleet.cells))

    def losses() -> Tensor:
        made = fleet.unet(*given, task_ids=everything, return_dict=False)[0]
        return (made - target).pow(2).mean(dim=(1, 2, 3)).unflatten(0, (-1, SIZE)).mean(dim=1)

    names = [str(cell) for cell in everything.tolist()]
    quiet = {"until": time.monotonic() + 600, "most_steps": 8, "say": lambda text: None}
    fit(fleet.groups(0.1), losses, names=names, clip=fleet.clip, **quiet)

    for index, model in enumerate(start):
        if NETWORKS[index].shared_norms or NETWORKS[index].uniform:
            continue  # no training of ours keeps these as they are
        cells = (fleet.cells.network == index).nonzero()[:, 0].tolist()
        wanted = of(cells, target)

        def single(index: int = index, model: MTUUNet2DConditionModel = model, wanted: Tensor = wanted) -> Tensor:
            made = alone(fleet, index, model, given)
            return (made - wanted).pow(2).mean(dim=(1, 2, 3)).unflatten(0, (-1, SIZE)).mean(dim=1)

        model.requires_grad_(False)
        trained = trained_parameters(model)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        decayed = [p for n, p in trained.items() if p.dim() > 1 and "norm" not in n and "embedding" not in n]
        rest = [p for p in trained.values() if not any(p is one for one in decayed)]
        groups = [Group((torch.nn.ParameterList(decayed),), 0.1), Group((torch.nn.ParameterList(rest),), 0.1, 0.0)]
        fit(groups, single, names=[str(c) for c in cells], **quiet)
        ours = trained_parameters(fleet.network(index))
        for name, parameter in trained.items():
            torch.testing.assert_close(ours[name], parameter, rtol=0.0, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_gradients_are_clipped_network_by_network(base: UNet2DConditionModel) -> None:
    """Adam hides it from the weights: it does not mind a factor."""
    fleet = fleet_of(base)
    parameters = [p for group in fleet.groups(1e-3) for p in group.parameters()]
    sizes = torch.tensor([10.0, 1e-3, 1e-3, 10.0, 1e-3, 1e-3])
    drawn = torch.Generator().manual_seed(0)
    before = []
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=drawn) * sizes.view(-1, *[1] * (parameter.dim() - 1))
        before.append(parameter.grad.clone())
    small = torch.stack([g[1].norm() for g in before]).norm()
    assert small < CLIP
    fleet.clip(parameters)
    for index, size in enumerate(sizes):
        norm = torch.stack([p.grad[index].norm() for p in parameters]).norm()
        if size > 1:
            assert float(norm) == pytest.approx(CLIP, rel=1e-3)
        else:
            assert all(torch.equal(p.grad[index], g[index]) for p, g in zip(parameters, before, strict=True))


def test_what_a_network_is_denied_stays_as_it_was(base: UNet2DConditionModel) -> None:
    fleet = fleet_of(base)
    perturb(fleet)
    shared, uniform = fleet.network(4), fleet.network(5)
    norms = [m for n, m in shared.named_modules() if n.endswith(".ff.norm")]
    assert norms and all(torch.equal(m.weight[0], m.weight[3]) for m in norms)
    embedding = torch.randn(4, 8)
    for name, block in uniform.named_modules():
        if name.endswith(".ff"):
            mixed = block.router(embedding, torch.arange(4))
            assert torch.equal(mixed, torch.full((4, 4), 0.25))
