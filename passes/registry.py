"""Which passes there are, and which of them make up a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mtu_compile.core.errors import ConfigError
from passes.align_ranges import AlignRanges
from passes.base import TASK_PIPELINE, Pass
from passes.bind_task import BindTask
from passes.cleanup import Cleanup
from passes.deep_feature import EmitDeepFeature, TakeDeepFeature
from passes.drop_experts import DropExperts
from passes.fit_int16_sums import FitInt16Sums
from passes.fold_routing import FoldRouting
from passes.freeze_shapes import FreezeShapes
from passes.legalise_qdq import LegaliseQdq
from passes.merge_experts import MergeExperts
from passes.plain_attention import PlainAttention
from passes.tabulate_tasks import TabulateTasks
from passes.to_half import to_bf16, to_fp16
from passes.uint8_activations import Uint8Activations

__all__ = ["SHARED_PIPELINE", "STATIC_PIPELINE", "TASK_PIPELINE", "Registry", "builtin"]

#: Any other graph (a plain UNet, or a multi-task one that keeps its task input) becomes static.
STATIC_PIPELINE = ("mtu::freeze-shapes", "mtu::plain-attention", "mtu::cleanup")

#: A multi-task graph becomes one that reads the task of each sample, and has no routers.
SHARED_PIPELINE = (
    "mtu::tabulate-tasks",
    "mtu::merge-experts",
    "mtu::freeze-shapes",
    "mtu::plain-attention",
    "mtu::cleanup",
)


class Registry:
    """Passes by id; a second pass with an id that is taken is refused."""

    def __init__(self, passes: Iterable[Pass]) -> None:
        self._passes: dict[str, Pass] = {}
        for item in passes:
            if item.id in self._passes:
                raise ConfigError(f"two passes are called {item.id!r}")
            self._passes[item.id] = item

    @property
    def ids(self) -> tuple[str, ...]:
        """All ids, in the order of registration."""
        return tuple(self._passes)

    def pipeline(self, ids: Sequence[str]) -> tuple[Pass, ...]:
        """The passes called ``ids``.

        Raises:
            ConfigError: an unknown id, an id twice, or a pass in front of one it has to come after.
        """
        for position, name in enumerate(ids):
            if name not in self._passes:
                raise ConfigError(f"unknown pass {name!r}", hint=f"there are {', '.join(self._passes)}")
            if name in ids[:position]:
                raise ConfigError(f"pass {name!r} is in the pipeline twice")
            if late := [other for other in self._passes[name].after if other in ids[position:]]:
                raise ConfigError(f"pass {name!r} has to come after {late[0]!r}")
        return tuple(self._passes[name] for name in ids)


def builtin() -> Registry:
    """The passes of this package."""
    specialising = (
        BindTask(),
        FoldRouting(),
        DropExperts(),
        MergeExperts(),
        FreezeShapes(),
        PlainAttention(),
        Cleanup(),
    )
    sharing = (TabulateTasks(), AlignRanges())
    lowering = (LegaliseQdq(), Uint8Activations(), FitInt16Sums(), to_fp16(), to_bf16())
    return Registry((*specialising, *sharing, *lowering, EmitDeepFeature(), TakeDeepFeature()))
