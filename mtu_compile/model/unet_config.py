"""What a UNet's ``config.json`` says of its tasks and experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from mtu_compile.core.schema import Mismatch, Range, conform, show
from mtu_compile.core.tasks import Tasks

#: The paper has 4; more than this make no sense of a feed-forward of a few thousand channels.
Count = Annotated[int, Range(1, 256)]
Width = Annotated[int, Range(1, 65536)]


@dataclass(frozen=True)
class MTUConfig:
    """The multi-task part; the keys beside it are those of diffusers' ``UNet2DConditionModel``.

    Attributes:
        tasks: a task id is an index into these.
        num_experts: N, has to divide every feed-forward width.
        d_task: width of the learnable task embedding.
        router_width: hidden width of each block's router.
        norm_per_expert: one norm affine per task and expert instead of one per task.
        top_k: experts kept for each task, or ``None`` for all of them.
    """

    tasks: Tasks
    num_experts: Count = 4
    d_task: Width = 768
    router_width: Width = 768
    norm_per_expert: bool = False
    top_k: tuple[Count, ...] | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and (len(self.top_k) != len(self.tasks) or max(self.top_k) > self.num_experts):
            wanted = f"for each of {len(self.tasks)} tasks a whole number from 1 to {self.num_experts}"
            raise Mismatch("top_k", show(self.top_k), wanted)

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> MTUConfig:
        """Out of a whole ``config.json``; ``Mismatch``, a ``ModelError``, naming the key that is wrong."""
        parsed = conform(cls, {key: value for key, value in config.items() if key in MTU_KEYS})
        assert isinstance(parsed, cls)
        return parsed


#: What only the multi-task UNet has in its config.
MTU_KEYS = tuple(one.name for one in fields(MTUConfig))
