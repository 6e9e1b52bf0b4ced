"""The parts a pretrained transformer block is upcycled with: experts, task norm and router.

Source: Chavhan et al., "Upcycling Text-to-Image Diffusion Models for Multi-Task Capabilities", ICML 2025, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import Tensor, nn

from mtu_compile.core.errors import ModelError


class TaskNorm(nn.Module):  # type: ignore[misc]
    """Layer norm whose affine belongs to the task (and, optionally, to the expert).

    Args:
        dim: C, the width that is normalised.
        eps: added to the variance.
        num_tasks: T.
        num_affines: N for one affine per task and expert, or 1 for one per task.
    """

    def __init__(self, dim: int, eps: float, num_tasks: int, num_affines: int) -> None:
        super().__init__()
        self.normalized_shape = (dim,)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_tasks, num_affines, dim))
        self.bias = nn.Parameter(torch.zeros(num_tasks, num_affines, dim))

    def forward(self, x: Tensor, task_ids: Tensor) -> list[Tensor]:
        """``x`` [B, L, C] and ``task_ids`` [B] → one [B, L, C] per affine of the task (1 or N of them)."""
        normed = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        weight, bias = self.weight[task_ids], self.bias[task_ids]  # [B, 1 or N, C]
        return [normed * weight[:, i, None, :] + bias[:, i, None, :] for i in range(weight.shape[1])]


class Router(nn.Module):  # type: ignore[misc]
    """Two-layer MLP from the task embedding to the experts' mixing weights.

    Its last layer starts at zero, so that an upcycled network mixes uniformly. ``top_k[task]`` keeps the k largest
    weights of that task; logits that tie with the k-th are kept too, which leaves the uniform start uniform.
    """

    def __init__(self, d_task: int, width: int, num_experts: int, top_k: Sequence[int] | None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_task, width)
        self.fc2 = nn.Linear(width, num_experts)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        if top_k is not None:
            self.register_buffer("top_k", torch.tensor(top_k, dtype=torch.int64), persistent=False)
        else:
            self.top_k = None

    def forward(self, task_embedding: Tensor, task_ids: Tensor) -> Tensor:
        """``task_embedding`` [B, d_task], ``task_ids`` [B] → mixing weights [B, N], non-negative, summing to 1."""
        logits = self.fc2(F.relu(self.fc1(task_embedding)))
        if self.top_k is not None:
            ranked = torch.topk(logits, logits.shape[-1], dim=-1).values
            threshold = ranked.gather(-1, (self.top_k[task_ids] - 1)[:, None])
            logits = logits.masked_fill(logits < threshold, float("-inf"))
        return logits.softmax(dim=-1)


class TaskExperts(nn.Module):  # type: ignore[misc]
    """N experts mixed by a router: ``FFN(x) = sum_i w_i(task) * E_i(norm_task(x))``."""

    def __init__(
        self,
        dense: FeedForward,
        eps: float,
        *,
        num_tasks: int,
        num_experts: int,
        d_task: int,
        router_width: int,
        norm_per_expert: bool,
        top_k: Sequence[int] | None,
    ) -> None:
        super().__init__()
        if not isinstance(dense.net[0], GEGLU):
            raise ModelError("a feed-forward is not GEGLU", hint="only UNets of the Stable Diffusion family upcycle")
        dim, inner = dense.net[2].out_features, dense.net[2].in_features
        if inner % num_experts:
            raise ModelError(
                f"{num_experts} experts do not divide a feed-forward of width {inner}",
                hint="choose a number of experts that divides every feed-forward width",
            )
        self.norm = TaskNorm(dim, eps, num_tasks, num_experts if norm_per_expert else 1)
        self.router = Router(d_task, router_width, num_experts, top_k)
        dropout = dense.net[1].p
        self.experts = nn.ModuleList(
            FeedForward(dim, dropout=dropout, inner_dim=inner // num_experts) for _ in range(num_experts)
        )

    def forward(self, x: Tensor, task_ids: Tensor, task_embedding: Tensor) -> Tensor:
        """``x`` [B, L, C], ``task_ids`` [B], ``task_embedding`` [B, d_task] → [B, L, C]."""
        normed = self.norm(x, task_ids)
        weights = self.router(task_embedding, task_ids)
        mixed = None
        for i, expert in enumerate(self.experts):
            weighted = expert(normed[i % len(normed)]) * weights[:, i, None, None]
            mixed = weighted if mixed is None else mixed + weighted
        assert mixed is not None
        return mixed


class MTUTransformerBlock(nn.Module):  # type: ignore[misc]
    """A pretrained ``BasicTransformerBlock`` with its feed-forward upcycled; attention and its norms stay as they are.

    The task reaches the block through ``cross_attention_kwargs`` (keys ``task_ids`` and ``task_embedding``), the one
    channel diffusers passes unchanged from the UNet to every transformer block.
    """

    def __init__(self, block: BasicTransformerBlock, **experts: object) -> None:
        super().__init__()
        if getattr(block, "norm_type", "layer_norm") != "layer_norm" or block.only_cross_attention:
            raise ModelError(
                "a transformer block is not of the Stable Diffusion kind",
                hint="upcycling knows UNets with plain layer norms, self-attention and cross-attention",
            )
        self.norm1, self.attn1 = block.norm1, block.attn1
        self.norm2, self.attn2 = block.norm2, block.attn2
        self.ff = TaskExperts(block.ff, block.norm3.eps, **experts)  # type: ignore[arg-type]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        assert cross_attention_kwargs is not None
        x = hidden_states
        x = self.attn1(self.norm1(x), attention_mask=attention_mask) + x
        x = self.attn2(self.norm2(x), encoder_hidden_states, attention_mask=encoder_attention_mask) + x
        return self.ff(x, cross_attention_kwargs["task_ids"], cross_attention_kwargs["task_embedding"]) + x
