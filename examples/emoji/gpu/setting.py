"""How a run on the GPU goes, and networks compiled where that works."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.emoji.gpu.loop import Group, History, fit


@dataclass(frozen=True)
class Setting:
    """How a run goes.

    Attributes:
        device: where everything lies.
        batch: examples a step of each part ("vae", "base", "tasks").
        compile: parts whose network is compiled by ``torch.compile`` first.
        graph: record steps as CUDA graphs.
        most_steps: end a part after so many steps, for tests; the clock ends it otherwise.
        variants: pool variants at most, for tests.
    """

    device: torch.device
    batch: dict[str, int]
    compile: frozenset[str] = frozenset()
    graph: bool = True
    most_steps: int | None = None
    variants: int = 1000
    say: Callable[[str], None] = print

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16)

    def fit(
        self, groups: Sequence[Group], losses: Callable[[], Tensor], names: Sequence[str], until: float, **more: Any
    ) -> History:
        return fit(
            groups,
            losses,
            until=until,
            most_steps=self.most_steps,
            names=names,
            graph=self.graph,
            say=self.say,
            **more,
        )


def fast(setting: Setting, part: str, call: Callable[..., Tensor], *example: Tensor) -> Callable[..., Tensor]:
    """``call`` compiled, if the setting asks for it and ``example`` goes through forwards and backwards."""
    if part not in setting.compile:
        return call
    began = time.monotonic()
    try:
        compiled: Callable[..., Tensor] = torch.compile(call, dynamic=False)
        with setting.autocast():
            compiled(*example).float().mean().backward()
        setting.say(f"  compiled {part} in {time.monotonic() - began:.0f} s")
        return compiled
    except Exception as error:  # whatever it is, the run must go on
        setting.say(f"  {part} does not compile, goes on without: {type(error).__name__} {str(error)[:300]}")
        torch._dynamo.reset()
        return call
