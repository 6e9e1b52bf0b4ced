"""The multi-task upcycled UNet as a diffusers model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from mtu_compile.core.errors import ModelError
from mtu_compile.core.families import TEXT_EMBEDS, TIME_IDS
from mtu_compile.model.experts import MTUTransformerBlock
from mtu_compile.model.unet_config import MTUConfig
from mtu_compile.model.unet_support import check_task, check_unet, takes_labels


def _with_base_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """Let diffusers see the base UNet's arguments behind ``**base``, so that they are saved in ``config.json``."""
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
    base = list(inspect.signature(UNet2DConditionModel.__init__).parameters.values())[1:]
    keyword = [p.replace(kind=p.KEYWORD_ONLY) for p in base]
    init.__signature__ = inspect.Signature([*own, *keyword])  # type: ignore[attr-defined]
    return init


class TaskConvIn(nn.Module):  # type: ignore[misc]
    """One input convolution per task over the noisy latent and the task's own condition channels.

    All tasks are computed as one convolution over zero-masked channel slots, so that a batch may mix tasks.
    """

    def __init__(self, conv: nn.Conv2d, condition_channels: Sequence[int]) -> None:
        super().__init__()
        self.stride, self.padding = conv.stride, conv.padding
        self.convs = nn.ModuleList()
        for extra in condition_channels:
            channels = conv.in_channels + extra
            self.convs.append(nn.Conv2d(channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding))

    def forward(self, sample: Tensor, task_ids: Tensor) -> Tensor:
        """``sample`` [B, C_max, H, W] (channels past the task's own are ignored), ``task_ids`` [B] → [B, C0, H, W]."""
        tasks = torch.arange(len(self.convs), device=task_ids.device)
        one_hot = (task_ids[:, None] == tasks).to(sample.dtype)  # [B, T]
        slots = [sample[:, : c.in_channels] * one_hot[:, i, None, None, None] for i, c in enumerate(self.convs)]
        weight = torch.cat([c.weight for c in self.convs], dim=1)
        bias = one_hot @ torch.stack([c.bias for c in self.convs])
        out = nn.functional.conv2d(torch.cat(slots, dim=1), weight, None, self.stride, self.padding)
        return out + bias[:, :, None, None]


class MTUUNet2DConditionModel(UNet2DConditionModel):  # type: ignore[misc]
    """A ``UNet2DConditionModel`` whose feed-forwards are task-routed experts.

    Takes every argument of ``UNet2DConditionModel`` and, in front of them:

    Args:
        tasks: descriptions of the tasks (see ``Task.to_json``); a task id is an index into this list.
        num_experts: N, has to divide every feed-forward width.
        d_task: width of the learnable task embedding.
        router_width: hidden width of each block's router.
        norm_per_expert: one norm affine per task and expert instead of one per task.
        top_k: experts kept for each task, or ``None`` for all of them.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    @_with_base_arguments
    def __init__(
        self,
        tasks: Sequence[Mapping[str, Any]] = (),
        num_experts: int = 4,
        d_task: int = 768,
        router_width: int = 768,
        norm_per_expert: bool = False,
        top_k: Sequence[int] | None = None,
        **base: Any,
    ) -> None:
        multi_task = MTUConfig.from_json(
            {
                "tasks": list(tasks),
                "num_experts": num_experts,
                "d_task": d_task,
                "router_width": router_width,
                "norm_per_expert": norm_per_expert,
                "top_k": top_k,
            }
        )
        check_unet(base, parameters=inspect.signature(UNet2DConditionModel.__init__).parameters)
        for task in multi_task.tasks:
            check_task(task, base)
        super().__init__(**base)
        self.tasks = multi_task.tasks
        if takes_labels(base):
            labels = torch.tensor([task.class_label for task in self.tasks])
            self.register_buffer("class_labels", labels, persistent=False)
        self.task_embedding = nn.Embedding(len(self.tasks), d_task)
        self._upcycle_blocks(
            num_tasks=len(self.tasks),
            num_experts=num_experts,
            d_task=d_task,
            router_width=router_width,
            norm_per_expert=norm_per_expert,
            top_k=top_k,
        )
        self._upcycle_conv_in()

    def _upcycle_blocks(self, **experts: Any) -> None:
        blocks = [(name, block) for name, block in self.named_modules() if isinstance(block, BasicTransformerBlock)]
        if not blocks:
            raise ModelError("the UNet has no transformer blocks to upcycle")
        for name, block in blocks:
            parent, _, index = name.rpartition(".")
            self.get_submodule(parent)[int(index)] = MTUTransformerBlock(block, **experts)  # type: ignore[index]

    def _upcycle_conv_in(self) -> None:
        channels: list[int] = [task.condition_channels(self.config.in_channels) for task in self.tasks]
        self.task_conv_in = TaskConvIn(self.get_submodule("conv_in"), channels)
        self.conv_in = nn.Identity()

    def to(self, *args: Any, **kwargs: Any) -> MTUUNet2DConditionModel:
        """``nn.Module.to``: diffusers 0.42 warns at every cast that "modules should be kept in float32: []"."""
        nn.Module.to(self, *args, **kwargs)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in, whatever its weights are kept in (``mtu_compile.model.widened``)."""
        return self.task_conv_in.convs[0].bias.dtype  # type: ignore[no-any-return]

    @property
    def latent_channels(self) -> int:
        """Channels of the noisy latent."""
        return int(self.config.in_channels)

    @property
    def sample_channels(self) -> int:
        """Channels of the ``sample`` input: the noisy latent and the widest condition."""
        return self.latent_channels + max(task.condition_channels(self.latent_channels) for task in self.tasks)

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        task_ids: Tensor,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        timestep_cond: Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor, ...]:
        """Predict the noise (or velocity).

        Args:
            sample: [B, C, H, W], noisy latent then the task's condition, padded with any values up to
                ``sample_channels`` (a batch of one task may leave the padding away if C covers that task).
            timestep: scalar or [B].
            encoder_hidden_states: [B, L, D].
            task_ids: [B], int64, an index into ``tasks`` for each sample.
            added_cond_kwargs: SDXL's ``text_embeds`` [B, P] and ``time_ids`` [B, 6].
            timestep_cond: [B, D], the guidance scale (``runtime.guidance.embed_scale``) of a latent consistency model.

        A UNet with class labels is told those of the tasks.
        """
        missing = self.sample_channels - sample.shape[1]
        if missing > 0:
            sample = nn.functional.pad(sample, (0, 0, 0, 0, 0, missing))
        if takes_labels(self.config):
            kwargs.setdefault("class_labels", self.class_labels[task_ids])
        routed = {"task_ids": task_ids, "task_embedding": self.task_embedding(task_ids)}
        return super().forward(
            self.task_conv_in(sample, task_ids),
            timestep,
            encoder_hidden_states,
            cross_attention_kwargs=routed,
            added_cond_kwargs=added_cond_kwargs,
            timestep_cond=timestep_cond,
            return_dict=return_dict,
            **kwargs,
        )


def call_unet(unet: Any, inputs: Mapping[str, Tensor], **more: Any) -> Tensor:
    """The answer of a UNet to inputs by the names that graphs have: those a family adds are keyword arguments apart."""
    added = {name: inputs[name] for name in (TEXT_EMBEDS, TIME_IDS) if name in inputs}
    rest = {name: value for name, value in inputs.items() if name not in added}
    answer: Tensor = unet(**rest, **more, added_cond_kwargs=added or None, return_dict=False)[0]
    return answer
