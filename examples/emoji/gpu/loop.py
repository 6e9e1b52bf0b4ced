"""A training loop that follows the clock: it ends when its seconds are over, with its learning rate at zero.

On a GPU the whole step (drawing the batch, forward, backward, clipping, AdamW) is one CUDA graph: a network of nine
million parameters otherwise waits for Python. The moving average's width grows with the run, as in Karras et al.,
"Analyzing and Improving the Training Dynamics of Diffusion Models" (CVPR 2024, section 3), so that it needs no length.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 200  # steps
CLIP = 1.0
EMA_POWER = 16.0  # a width of about 5 % of the run
EMA_EVERY = 4  # steps
TICK = 20  # steps between looks at the clock
KEPT = 500  # steps between the states a diverging run falls back to


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak learning rate."""

    modules: Sequence[nn.Module]
    peak: float
    weight_decay: float = 0.01

    def parameters(self) -> list[nn.Parameter]:
        found = {id(p): p for module in self.modules for p in module.parameters() if p.requires_grad}
        return list(found.values())


@dataclass
class History:
    """What a run measured: (step, seconds, losses) at every tick kept, and the pace."""

    rows: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


def fit(
    groups: Sequence[Group],
    losses: Callable[[], Tensor],
    *,
    until: float,
    most_steps: int | None = None,
    names: Sequence[str] = ("loss",),
    graph: bool = True,
    clip: Callable[[Sequence[nn.Parameter]], object] = lambda ps: nn.utils.clip_grad_norm_(ps, CLIP, foreach=True),
    say: Callable[[str], None] = print,
    on_tick: Callable[[float], None] = lambda progress: None,
) -> History:
    """Train until ``time.monotonic()`` is ``until``, or for ``most_steps``; leave the averaged weights in the modules.

    Args:
        losses: draws a batch and gives the losses [k] whose sum is minimised; called once when a graph is recorded.
        graph: record the step as a CUDA graph, where there is a GPU.
        clip: bounds the gradients of the parameters, on the GPU.
        on_tick: sees the share of the run that is done, between steps; the weights are those of the moment.
    """
    loop = _Loop(groups, losses, names, clip, say)
    loop.prepare(graph)
    began = time.monotonic()
    seconds = max(1.0, until - began)  # what preparation has left
    history, shown = History(), 0.0
    while True:
        spent = time.monotonic() - began
        progress = max(spent / seconds, loop.step / most_steps if most_steps else 0.0)
        if progress >= 1:
            break
        loop.set_rate(progress)
        for _ in range(TICK if most_steps is None else min(TICK, most_steps - loop.step)):
            loop.run()
        values = loop.values()
        history.rows.append({"step": loop.step, "seconds": round(spent, 2), **dict(zip(names, values, strict=True))})
        if not all(map(math.isfinite, values)):
            loop.fall_back()
        elif loop.step % KEPT < TICK:
            loop.keep()
        if spent - shown > max(5.0, seconds / 20):
            shown = spent
            losses_now = " ".join(f"{n} {v:.4f}" for n, v in zip(names, values, strict=True))
            say(f"  {100 * progress:3.0f} % step {loop.step} {losses_now} ({loop.step / spent:.1f} steps/s)")
        on_tick(progress)
    history.steps, history.seconds = loop.step, time.monotonic() - began
    loop.finish()
    return history


class _Loop:
    def __init__(
        self,
        groups: Sequence[Group],
        losses: Callable[[], Tensor],
        names: Sequence[str],
        clip: Callable[[Sequence[nn.Parameter]], object],
        say: Callable[[str], None],
    ) -> None:
        self.groups, self.losses, self.clip, self.say = groups, losses, clip, say
        self.parameters = [p for group in groups for p in group.parameters()]
        self.device = self.parameters[0].device
        self.on_gpu = self.device.type == "cuda"
        self.step = 0
        self.scale = 1.0  # of the learning rates; halved when a run diverges
        # Matrices decay, norms and biases do not.
        settings = [
            {"params": kept, "peak": group.peak, "weight_decay": decay}
            for group in groups
            for kept, decay in (
                ([p for p in group.parameters() if p.dim() > 1], group.weight_decay),
                ([p for p in group.parameters() if p.dim() <= 1], 0.0),
            )
            if kept
        ]
        for one in settings:
            # A graph reads its rates from the GPU.
            one["lr"] = torch.zeros((), device=self.device) if self.on_gpu else 0.0
        self.optimizer = torch.optim.AdamW(settings, betas=(0.9, 0.99), fused=True, capturable=self.on_gpu)
        self.average = [p.detach().clone() for p in self.parameters]
        self.kept = [p.detach().clone() for p in self.parameters]
        self.sums = torch.zeros(len(names), device=self.device)
        self.since = 0
        self.graph: Any = None

    def body(self) -> None:
        losses = self.losses()
        losses.sum().backward()
        self.clip(self.parameters)
        self.optimizer.step()
        self.sums.add_(losses.detach())

    def prepare(self, graph: bool) -> None:
        """Warm up at a rate of zero and record the step."""
        self.set_rate(0.0)
        if not self.on_gpu:
            return
        began = time.monotonic()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(4):
                self.optimizer.zero_grad(set_to_none=True)
                self.body()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.say(f"  warm after {time.monotonic() - began:.1f} s")
        self.optimizer.zero_grad(set_to_none=True)
        if graph:
            try:
                recorded = torch.cuda.CUDAGraph()
                with torch.cuda.graph(recorded):
                    self.body()
                self.graph = recorded
            except RuntimeError as error:
                self.say(f"  no CUDA graph, step by step instead: {str(error)[:300]}")
                torch.cuda.synchronize()
        self.sums.zero_()
        self.say(f"  ready after {time.monotonic() - began:.1f} s")

    def set_rate(self, progress: float) -> None:
        """Warm-up, then a cosine to zero at the end of the run."""
        shape = 0.5 * (1 + math.cos(math.pi * progress)) * min(1.0, self.step / WARM_UP) * self.scale
        for group in self.optimizer.param_groups:
            if self.on_gpu:
                group["lr"].fill_(group["peak"] * shape)
            else:
                group["lr"] = group["peak"] * shape

    def run(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self.body()
        self.step += 1
        self.since += 1
        if self.step % EMA_EVERY == 0:
            keep = (1 - EMA_EVERY / self.step) ** (EMA_POWER + 1)
            torch._foreach_lerp_(self.average, self.detached(), 1 - keep)

    def detached(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]

    def values(self) -> list[float]:
        """Mean losses since the last look (waits for the GPU)."""
        values = (self.sums / max(1, self.since)).tolist()
        self.sums.zero_()
        self.since = 0
        return list(values)

    def keep(self) -> None:
        torch._foreach_copy_(self.kept, self.detached())

    def fall_back(self) -> None:
        self.scale *= 0.5
        self.say(f"  a loss is not finite at step {self.step}: back to an earlier state at half the rate")
        torch._foreach_copy_(self.detached(), self.kept)
        torch._foreach_copy_(self.average, self.kept)
        for state in self.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def finish(self) -> None:
        """Put the averaged weights into the modules."""
        if self.step >= EMA_EVERY:
            torch._foreach_copy_(self.detached(), self.average)
        self.graph = None
        self.optimizer.zero_grad(set_to_none=True)
