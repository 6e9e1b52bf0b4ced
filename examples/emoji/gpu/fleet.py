"""Many multi-task networks over one frozen backbone, trained in lock-step: every step is the same step for all of them.

What upcycling trains (experts, routers, task norms, task embedding, input convolutions) has one row for each network in
stacked tensors; the backbone's layers see all networks' samples as one batch. A *cell* is one task of one network. The
arithmetic is that of ``MTUUNet2DConditionModel``, and ``Fleet.network`` gives any of them back as one.

Networks of several sizes are compared fairly this way: same data in the same order, same noise, timesteps, rates and
number of steps, whatever the clock does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from examples.emoji.gpu.loop import CLIP, Group
from mtu_compile.core.tasks import Task
from mtu_compile.model.experts import TaskExperts
from mtu_compile.model.unet import MTUUNet2DConditionModel, TaskConvIn
from mtu_compile.model.upcycle import upcycle_unet


@dataclass(frozen=True)
class Network:
    """One network of a fleet.

    Attributes:
        variant: what is compared; networks of a variant differ in ``seed`` and ``tasks``.
        seed: of its initialisation, and which of the data's streams it sees.
        tasks: indices of its own tasks.
        experts: N.
        shared_norms: one norm for all of its tasks, instead of one each.
        uniform: the router stays as it starts, mixing all experts alike.
    """

    variant: str
    seed: int
    tasks: tuple[int, ...]
    experts: int
    shared_norms: bool = False
    uniform: bool = False


class Cells(nn.Module):  # type: ignore[misc]
    """Which network and which of its rows each cell is; cells are ordered by network, then by its tasks."""

    def __init__(self, networks: Sequence[Network]) -> None:
        super().__init__()
        every = [(n, row, task) for n, one in enumerate(networks) for row, task in enumerate(one.tasks)]
        rows = {
            "network": [n for n, _, _ in every],
            "row": [row for _, row, _ in every],
            "norm_row": [0 if networks[n].shared_norms else row for n, row, _ in every],
            "task": [task for _, _, task in every],
            "seed": [networks[n].seed for n, _, _ in every],
        }
        for name, values in rows.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.register_buffer("routed", torch.tensor([float(not one.uniform) for one in networks]), persistent=False)

    def __len__(self) -> int:
        return len(self.network)


class FleetExperts(nn.Module):  # type: ignore[misc]
    """``TaskExperts`` of R networks: each is one dense feed-forward whose hidden vector the mixing weights scale."""

    #: Stacked parameters that are matrices of a network, which weight decay is for.
    MATRICES = ("fc1_weight", "fc2_weight", "up", "down")

    def __init__(self, members: Sequence[TaskExperts], cells: Cells) -> None:
        super().__init__()
        self.cells, self.eps = cells, members[0].norm.eps
        packed = [pack(one) for one in members]
        for name in packed[0]:
            parts = [one[name] for one in packed]
            most = [max(size) for size in zip(*(p.shape for p in parts), strict=True)]
            self.register_parameter(name, nn.Parameter(torch.stack([_pad(p, most) for p in parts])))
        inner, most_experts = self.down.shape[1], self.down_bias.shape[1]
        counts = torch.tensor([len(one.experts) for one in members])
        expert = torch.arange(inner)[None] // (inner // counts)[:, None]
        missing = torch.arange(most_experts)[None] >= counts[:, None]
        self.register_buffer("expert", expert, persistent=False)  # [R, inner], of each hidden unit
        self.register_buffer("missing", missing, persistent=False)  # [R, N]

    def mix(self, task_embedding: Tensor, cells: Tensor) -> Tensor:
        """Mixing weights [cells, N] for the cells' embeddings [cells, d_task]."""
        network = self.cells.network[cells]
        hidden = torch.baddbmm(
            self.fc1_bias.index_select(0, network)[:, :, None],
            self.fc1_weight.index_select(0, network),
            task_embedding[:, :, None],
        )
        logits = torch.baddbmm(
            self.fc2_bias.index_select(0, network)[:, :, None], self.fc2_weight.index_select(0, network), hidden.relu()
        )[:, :, 0]
        logits = logits.float() * self.cells.routed[network][:, None]
        return logits.masked_fill(self.missing[network], float("-inf")).softmax(dim=-1)

    def forward(self, x: Tensor, cells: Tensor, task_embedding: Tensor) -> Tensor:
        """``x`` [cells · b, L, C], the same number of samples for each cell."""
        network, row = self.cells.network[cells], self.cells.norm_row[cells]
        weights = self.mix(task_embedding, cells)
        normed = F.layer_norm(x, x.shape[-1:], eps=self.eps).reshape(len(cells), -1, x.shape[-1])
        normed = normed * self.norm_weight[network, row][:, None] + self.norm_bias[network, row][:, None]
        value, gate = torch.baddbmm(
            self.up_bias.index_select(0, network)[:, None], normed, self.up.index_select(0, network)
        ).chunk(2, dim=-1)
        hidden = value * F.gelu(gate) * weights.gather(1, self.expert[network])[:, None]
        bias = weights[:, None] @ self.down_bias.index_select(0, network)
        return torch.baddbmm(bias.to(hidden.dtype), hidden, self.down.index_select(0, network)).reshape(x.shape)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def unpack(self, index: int, into: TaskExperts) -> None:
        """Write network ``index`` into a module of its own."""
        for name, view in pack(into).items():
            row = getattr(self, name)[index]
            _write(into, name, row[tuple(slice(size) for size in view.shape)])


def pack(one: TaskExperts) -> dict[str, Tensor]:
    """The tensors of one network's experts as one dense feed-forward, values before gates, and its norm and router."""
    first, last = ([expert.net[i] for expert in one.experts] for i in (0, 2))
    halves = [[layer.proj.weight.detach().chunk(2)[half] for layer in first] for half in (0, 1)]
    biases = [[layer.proj.bias.detach().chunk(2)[half] for layer in first] for half in (0, 1)]
    return {
        "norm_weight": one.norm.weight.detach()[:, 0],  # [T, C]
        "norm_bias": one.norm.bias.detach()[:, 0],
        "fc1_weight": one.router.fc1.weight.detach(),  # [width, d_task]
        "fc1_bias": one.router.fc1.bias.detach(),
        "fc2_weight": one.router.fc2.weight.detach(),  # [N, width]
        "fc2_bias": one.router.fc2.bias.detach(),
        "up": torch.cat([*halves[0], *halves[1]]).T.contiguous(),  # [C, 2 · inner]
        "up_bias": torch.cat([*biases[0], *biases[1]]),
        "down": torch.cat([layer.weight.detach() for layer in last], dim=1).T.contiguous(),  # [inner, C]
        "down_bias": torch.stack([layer.bias.detach() for layer in last]),  # [N, C]
    }


def _write(one: TaskExperts, name: str, value: Tensor) -> None:
    """The inverse of ``pack`` for one of its tensors."""
    count = len(one.experts)
    if name in ("norm_weight", "norm_bias"):
        getattr(one.norm, name.removeprefix("norm_")).copy_(value[:, None])
    elif name.startswith("fc"):
        layer, kind = name.split("_")
        getattr(getattr(one.router, layer), kind).copy_(value)
    elif name in ("up", "up_bias"):
        kind, laid = ("weight", value.T) if name == "up" else ("bias", value)
        values, gates = (half.chunk(count) for half in laid.chunk(2))
        for expert, *pair in zip(one.experts, values, gates, strict=True):
            getattr(expert.net[0].proj, kind).copy_(torch.cat(pair))
    else:
        parts = value.T.chunk(count, dim=1) if name == "down" else value
        for expert, part in zip(one.experts, parts, strict=True):
            (expert.net[2].weight if name == "down" else expert.net[2].bias).copy_(part)


class FleetConvIn(nn.Module):  # type: ignore[misc]
    """``TaskConvIn`` of R networks. Condition channels that a task lacks must be zero in the sample."""

    MATRICES = ("weight",)

    def __init__(self, members: Sequence[TaskConvIn], channels: int, rows: int, cells: Cells) -> None:
        super().__init__()
        self.cells, self.kernel = cells, members[0].convs[0].kernel_size
        weights, biases = [], []
        for one in members:
            padded = [_pad(c.weight.detach(), (c.out_channels, channels, *self.kernel)) for c in one.convs]
            missing = rows - len(padded)
            weights.append(torch.stack(padded + [torch.zeros_like(padded[0])] * missing))
            biases.append(torch.stack([c.bias.detach() for c in one.convs] + [one.convs[0].bias.detach()] * missing))
        self.weight = nn.Parameter(torch.stack(weights))  # [R, T, C0, C, k, k]
        self.bias = nn.Parameter(torch.stack(biases))  # [R, T, C0]

    def forward(self, sample: Tensor, cells: Tensor) -> Tensor:
        """``sample`` [cells · b, C, H, W] → [cells · b, C0, H, W]."""
        network, row = self.cells.network[cells], self.cells.row[cells]
        columns = F.unfold(sample, self.kernel, padding=1)  # [cells · b, C · k · k, H · W]
        parts = columns.unflatten(0, (len(cells), -1)).transpose(1, 2).flatten(2)  # [cells, C · k · k, b · H · W]
        out = torch.baddbmm(self.bias[network, row][:, :, None], self.weight[network, row].flatten(2), parts)
        return out.unflatten(2, (-1, *sample.shape[-2:])).transpose(1, 2).flatten(0, 1)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def unpack(self, index: int, into: TaskConvIn) -> None:
        for row, conv in enumerate(into.convs):
            conv.weight.copy_(self.weight[index, row, :, : conv.in_channels])
            conv.bias.copy_(self.bias[index, row])


class FleetEmbedding(nn.Module):  # type: ignore[misc]
    """The task embeddings of R networks."""

    MATRICES = ()

    def __init__(self, members: Sequence[nn.Embedding], rows: int, cells: Cells) -> None:
        super().__init__()
        self.cells = cells
        padded = [_pad(one.weight.detach(), (rows, one.embedding_dim)) for one in members]
        self.weight = nn.Parameter(torch.stack(padded))

    def forward(self, cells: Tensor) -> Tensor:
        """[cells, d_task]."""
        chosen: Tensor = self.weight[self.cells.network[cells], self.cells.row[cells]]
        return chosen

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def unpack(self, index: int, into: nn.Embedding) -> None:
        into.weight.copy_(self.weight[index, : into.num_embeddings])


class Fleet:
    """The networks, over the backbone of ``base``.

    Attributes:
        unet: a UNet that takes the cells' numbers for task ids, and for each cell the same number of samples.
    """

    def __init__(
        self, base: UNet2DConditionModel, tasks: Sequence[Task], networks: Sequence[Network], **routing: int
    ) -> None:
        """``routing``: ``d_task`` and ``router_width``."""
        self.base, self.tasks, self.networks, self.routing = base, tuple(tasks), tuple(networks), routing
        self.cells = Cells(networks).to(base.device)
        members = [self._fresh(one) for one in networks]
        self.unet = upcycle_unet(base, tasks, num_experts=1, **routing).requires_grad_(False)
        rows = max(len(one.tasks) for one in networks)
        self.parts: dict[str, FleetExperts | FleetConvIn | FleetEmbedding] = {
            "task_conv_in": FleetConvIn(
                [one.task_conv_in for one in members], self.unet.sample_channels, rows, self.cells
            ),
            "task_embedding": FleetEmbedding([one.task_embedding for one in members], rows, self.cells),
        }
        for name, module in self.unet.named_modules():
            if isinstance(module, TaskExperts):
                self.parts[name] = FleetExperts([one.get_submodule(name) for one in members], self.cells)
        for name, part in self.parts.items():
            self.unet.set_submodule(name, part.to(base.device))

    def _fresh(self, one: Network) -> MTUUNet2DConditionModel:
        with torch.random.fork_rng():
            torch.manual_seed(one.seed)
            return upcycle_unet(self.base, [self.tasks[i] for i in one.tasks], num_experts=one.experts, **self.routing)

    def cells_of(self, task: int) -> list[int]:
        """The cells of one task: one for each network that knows it."""
        return (self.cells.task == task).nonzero()[:, 0].tolist()

    def owner(self, cell: int) -> Network:
        return self.networks[int(self.cells.network[cell])]

    def network(self, index: int) -> MTUUNet2DConditionModel:
        """One network as the model that ``mtu-compile train`` trains."""
        own = self._fresh(self.networks[index])
        for name, part in self.parts.items():
            part.unpack(index, own.get_submodule(name))
        if self.networks[index].shared_norms:
            for module in own.modules():
                if isinstance(module, TaskExperts):
                    for affine in (module.norm.weight, module.norm.bias):
                        affine.data.copy_(affine.data[:1].expand_as(affine).clone())
        if self.networks[index].uniform:
            for module in own.modules():
                if isinstance(module, TaskExperts):
                    nn.init.zeros_(module.router.fc2.weight)
                    nn.init.zeros_(module.router.fc2.bias)
        return own

    def groups(self, rate: float) -> list[Group]:
        """All that is trained, at one learning rate."""
        named = [(name, p, part) for part in self.parts.values() for name, p in part.named_parameters(recurse=False)]
        matrices = nn.ParameterList([p for name, p, part in named if name in part.MATRICES])
        rest = nn.ParameterList([p for name, p, part in named if name not in part.MATRICES])
        return [Group((matrices,), rate), Group((rest,), rate, 0.0)]

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def clip(self, parameters: Sequence[nn.Parameter]) -> None:
        """Each network's gradient to a norm of ``CLIP`` at most, as if it were trained alone."""
        grads = [p.grad for p in parameters if p.grad is not None]
        squares = torch.stack([g.flatten(1).pow(2).sum(1) for g in grads]).sum(0)
        scale = (CLIP / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale.view(-1, *[1] * (grad.dim() - 1)))


def _pad(value: Tensor, shape: Sequence[int]) -> Tensor:
    """Zeros at the end of every dimension."""
    missing = [(0, size - have) for size, have in zip(shape, value.shape, strict=True)]
    return F.pad(value, [n for pair in reversed(missing) for n in pair])
