"""Measure the graphs of one build at whatever precision and size is asked about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import passes
from mtu_compile.core.errors import ModelError, ToolchainMissing
from mtu_compile.core.precision import WEIGHTS_ONLY
from mtu_compile.graph import io as graph_io
from mtu_compile.planner.plan import BuildPlan, NetworkPlan, Suggestion
from targets.base import Precision, Target
from targets.costs.estimate import Footprint, footprint

if TYPE_CHECKING:
    import onnx_ir as ir

#: Prompts the text encoder is given at once: the picture's own and the one of guidance.
_PROMPTS = 2

#: Smaller sizes that are tried, in eighths of the size asked for.
_EIGHTHS = (7, 6, 5, 4, 3, 2, 1)

#: Latents divide by this: the UNets of the Stable Diffusion family halve them at most three times.
_LATENT_STEP = 8


class Survey:
    """Graphs of one build, read once; the arguments are those of ``mtu_compile.planner.survey``."""

    def __init__(
        self,
        target: Target,
        precision: Precision,
        graphs: Mapping[str, Path],
        parts: Mapping[str, Path],
        dynamic: Path | None,
        memory: int | None = None,
    ) -> None:
        self._target = target
        self._precision: Precision = precision
        self._rest = target.spec.rest
        scratch = target.spec.scratch
        self._tasks = {name: _Network(graph, self._rest, scratch) for name, graph in graphs.items()}
        self._parts = {name: _Network(graph, self._rest, scratch) for name, graph in parts.items()}
        self._dynamic = None if dynamic is None else _Dynamic(dynamic, self._rest, scratch)
        self._memory = memory
        self._workspace = int(getattr(target.spec, "workspace_bytes", 0) or 0)

    def plan(self) -> BuildPlan:
        """The plan, with suggestions where it does not fit."""
        companion = self._companion(self._precision)
        held = self._held(self._precision)
        tasks = [NetworkPlan(n, True, self._precision, one.at(held)) for n, one in self._tasks.items()]
        parts = [NetworkPlan(n, False, companion, one.at(companion)) for n, one in self._parts.items()]
        plan = BuildPlan(
            self._target.spec.name,
            self._precision,
            (*tasks, *parts),
            self._workspace,
            *self._device(),
            self._one_engine(),
        )
        if plan.device_bytes is None and (least := self._target.spec.least_memory_bytes) is not None:
            plan = replace(plan, least_bytes=int(least * (self._target.spec.shared or 1)))
        if plan.available_bytes is None or plan.fits:
            return plan
        suggestions = tuple(self._suggest(plan.available_bytes))
        return replace(plan, suggestions=suggestions)

    def _device(self) -> tuple[int, int | None]:
        """What is reserved of the device's memory, and that memory, which may have been given."""
        spec = self._target.spec
        if self._memory is None:
            return spec.reserved_bytes, self._target.memory()
        others = 0 if spec.shared is None else int(self._memory * (1 - spec.shared))
        return spec.reserved_bytes + others, self._memory

    def _held(self, precision: Precision) -> Precision:
        """What a network in ``precision`` lies in memory as."""
        unpacked = precision in WEIGHTS_ONLY and self._target.spec.unpacks_weights
        return self._rest if unpacked else precision

    def _companion(self, precision: Precision) -> Precision:
        try:
            return self._target.companion_precision(precision)
        except ImportError as error:
            spec, available = self._target.spec, self._target.probe()
            raise ToolchainMissing(
                f"target {spec.name!r} needs {available.toolchain} to be planned: {error}", hint=available.install_hint
            ) from error

    def _needs(self, precision: Precision, tasks: Sequence[str], latent: tuple[int, int] | None = None) -> int:
        """Bytes of a bundle of ``tasks`` in ``precision``, with pictures of another size if ``latent`` is given."""
        companion, total = self._companion(precision), self._workspace
        whole = self._latent
        area = 1.0 if latent is None else latent[0] * latent[1] / (whole[0] * whole[1])
        for name in tasks:
            network = self._tasks[name]
            memory = network.at(self._held(precision))
            factor = 1.0 if latent is None or self._dynamic is None else self._dynamic.scale(whole, latent)
            total += memory.weights_bytes + int(memory.activation_bytes * factor)
        for name, network in self._parts.items():
            memory = network.at(companion)
            total += memory.weights_bytes + int(memory.activation_bytes * (area if name.startswith("vae") else 1.0))
        return total

    def _one_engine(self) -> int | None:
        if self._dynamic is None:
            return None
        batch = max(one.batch for one in self._tasks.values())
        shared = self._dynamic.at(self._held(self._precision), batch, self._latent)
        return self._needs(self._precision, ()) + shared.total_bytes

    def _suggest(self, available: int) -> Iterator[Suggestion]:
        """What fits by changing one thing; where nothing does, by changing all; the closest if that fails too."""
        everything = tuple(self._tasks)
        found = [
            self._suggestion(f"--{precision}", available, precision, everything)
            for precision in self._smaller_precisions()
        ]
        if (fewer := self._fewer(self._precision, available)) and fewer != everything:
            found.append(self._suggestion(_task_options(fewer), available, self._precision, fewer))
        found.extend(self._smaller_size("", available, self._precision, everything))
        if not any(one.fits for one in found):
            smallest: Precision = min(
                (self._precision, *self._smaller_precisions()), key=lambda p: self._needs(p, everything)
            )
            prefix = "" if smallest == self._precision else f"--{smallest} "
            least = min(everything, key=lambda task: self._needs(smallest, (task,)))
            chosen = self._fewer(smallest, available) or (least,)
            options = f"{prefix}{_task_options(chosen) if chosen != everything else ''}".strip()
            if options:
                found.append(self._suggestion(options, available, smallest, chosen))
            found.extend(self._smaller_size(f"{options} ".lstrip(), available, smallest, chosen))
        yield from found

    def _suggestion(
        self,
        options: str,
        available: int,
        precision: Precision,
        tasks: Sequence[str],
        latent: tuple[int, int] | None = None,
    ) -> Suggestion:
        needs = self._needs(precision, tasks, latent)
        return Suggestion(options, needs, needs <= available)

    def _smaller_precisions(self) -> list[Precision]:
        everything = tuple(self._tasks)
        now = self._needs(self._precision, everything)
        return [p for p in self._target.spec.precisions if self._needs(p, everything) < now]

    def _fewer(self, precision: Precision, available: int) -> tuple[str, ...]:
        """As many tasks as fit together, smallest first, in the model's own order; none if not even one fits."""
        chosen: list[str] = []
        for task in sorted(self._tasks, key=lambda task: self._needs(precision, (task,))):
            if self._needs(precision, (*chosen, task)) <= available:
                chosen.append(task)
        return tuple(task for task in self._tasks if task in chosen)

    def _smaller_size(
        self, prefix: str, available: int, precision: Precision, tasks: Sequence[str]
    ) -> Iterator[Suggestion]:
        """The largest smaller size that fits, else the smallest there is."""
        last = None
        for latent in self._smaller_latents():
            height, width = (side * self._pixels for side in latent)
            last = self._suggestion(f"{prefix}--size {width}x{height}", available, precision, tasks, latent)
            if last.fits:
                break
        if last is not None:
            yield last

    def _smaller_latents(self) -> Iterator[tuple[int, int]]:
        if self._dynamic is None or self._pixels == 0:
            return
        height, width = self._latent
        for eighths in _EIGHTHS:
            smaller = height * eighths // 8, width * eighths // 8
            if all(side >= _LATENT_STEP and side % _LATENT_STEP == 0 for side in smaller):
                yield smaller

    @property
    def _latent(self) -> tuple[int, int]:
        """Rows and columns of the latent."""
        return next(iter(self._tasks.values())).latent

    @cached_property
    def _pixels(self) -> int:
        """Pixels of a picture along one row of the latent; 0 without a decoder."""
        decoder = self._parts.get("vae_decoder")
        return 0 if decoder is None else decoder.output_height // self._latent[0]


class _Network:
    """One static graph; its shapes are kept, its weights are not."""

    def __init__(self, path: Path, rest: Precision, scratch: float) -> None:
        self.path = path
        self._rest: Precision = rest
        self._scratch = scratch
        self._measured: dict[Precision, Footprint] = {}

    @cached_property
    def _model(self) -> ir.Model:
        model = graph_io.load(self.path)
        if any(value.shape is None or not value.shape.is_static() for value in model.graph.inputs):
            _freeze(model, passes.PassContext(batch=_PROMPTS))
        return model

    def at(self, precision: Precision) -> Footprint:
        """Memory of the graph built in ``precision``."""
        if precision not in self._measured:
            found = footprint(self._model, precision=precision, rest=self._rest)
            self._measured[precision] = _with_scratch(found, self._scratch)
        return self._measured[precision]

    @cached_property
    def latent(self) -> tuple[int, int]:
        """Rows and columns of a UNet's ``sample``."""
        shape = self._sample()
        return shape[2], shape[3]

    @property
    def batch(self) -> int:
        """Samples of a UNet step."""
        return self._sample()[0]

    @property
    def output_height(self) -> int:
        """Rows of the (first) output."""
        shape = self._model.graph.outputs[0].shape
        return 0 if shape is None else shape.numpy()[2]

    def _sample(self) -> tuple[int, ...]:
        for value in self._model.graph.inputs:
            if value.name == "sample" and value.shape is not None:
                return value.shape.numpy()
        raise ModelError(f"{self.path} has no input 'sample': it is no UNet", hint="export the model again")


class _Dynamic:
    """The UNet with free sizes and the task as an input, frozen at one size after the other."""

    def __init__(self, path: Path, rest: Precision, scratch: float) -> None:
        self._path = path
        self._rest: Precision = rest
        self._scratch = scratch
        self._activations: dict[tuple[int, int], int] = {}

    def at(self, precision: Precision, batch: int, latent: tuple[int, int]) -> Footprint:
        """Memory of one engine for all tasks."""
        model = graph_io.load(self._path)
        _freeze(model, passes.PassContext(batch=batch, height=latent[0], width=latent[1]))
        return _with_scratch(footprint(model, precision=precision, rest=self._rest), self._scratch)

    def scale(self, whole: tuple[int, int], latent: tuple[int, int]) -> float:
        """Activations at ``latent`` as a share of those at ``whole``; the same for every batch and precision."""
        for one in (whole, latent):
            if one not in self._activations:
                self._activations[one] = self.at("fp32", 1, one).activation_bytes
        return self._activations[latent] / self._activations[whole] if self._activations[whole] else 1.0


def _with_scratch(found: Footprint, scratch: float) -> Footprint:
    return replace(found, activation_bytes=int(found.activation_bytes * scratch))


def _freeze(model: ir.Model, context: passes.PassContext) -> None:
    for one in passes.builtin().pipeline(("mtu::freeze-shapes",)):
        one.requires(model, context)
        one.run(model, context)


def _task_options(tasks: Sequence[str]) -> str:
    return " ".join(f"--task {task}" for task in tasks)
