"""Measure the graphs of one build in whatever form, precision and size is asked about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import passes
from mtu_compile.core.errors import ConfigError, ToolchainMissing
from mtu_compile.core.precision import WEIGHTS_ONLY
from mtu_compile.core.routing import Routing, RoutingChoice
from mtu_compile.graph import io as graph_io
from mtu_compile.planner.plan import ALL_TASKS, BuildPlan, NetworkPlan, Suggestion
from mtu_compile.planner.routing import Recommendation, recommend
from mtu_compile.planner.unet import Unet
from targets.base import Precision, Target
from targets.costs.estimate import Footprint, footprint, stored_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

#: Prompts the text encoder is given at once: the picture's own and the one of guidance.
_PROMPTS = 2

#: Smaller sizes that are tried, in eighths of the size asked for.
_EIGHTHS = (7, 6, 5, 4, 3, 2, 1)

#: Latents divide by this: the UNets of the Stable Diffusion family halve them at most three times.
_LATENT_STEP = 8


@dataclass(frozen=True)
class _Options:
    """What a bundle is built with, as far as its memory depends on it.

    Attributes:
        precision: of the UNets.
        tasks: that it has.
        routing: as asked for.
        latent: rows and columns, where they are not those asked for.
    """

    precision: Precision
    tasks: tuple[str, ...]
    routing: RoutingChoice
    latent: tuple[int, int] | None = None


class Survey:
    """Graphs of one build, read once; the arguments are those of ``mtu_compile.planner.survey``."""

    def __init__(
        self,
        target: Target,
        precision: Precision,
        unet: Unet,
        parts: Mapping[str, Path],
        routing: RoutingChoice,
        memory: int | None = None,
    ) -> None:
        if routing == "shared" and not unet.routed:
            raise ConfigError(
                "this UNet has no task input: there is nothing that tasks could share",
                hint="leave --routing out, or say --routing static",
            )
        self._target = target
        self._rest = target.spec.rest
        self._unet = unet
        self._asked = _Options(precision, unet.tasks, routing)
        self._measured: dict[tuple[str, Precision], Footprint] = {}
        self._parts = {name: _part(graph) for name, graph in parts.items()}
        self._scales: dict[tuple[int, int], int] = {}
        self._workspace = int(getattr(target.spec, "workspace_bytes", 0) or 0)
        reserved, self._device_bytes = self._device(memory)
        self._reserved = reserved
        least = target.spec.least_memory_bytes if self._device_bytes is None else None
        self._least = None if least is None else int(least * (target.spec.shared or 1))

    def plan(self) -> BuildPlan:
        """The plan, with suggestions where it does not fit."""
        asked = self._asked
        companion, held = self._companion(asked.precision), self._held(asked.precision)
        tasks = [NetworkPlan(n, "task", asked.precision, self._static(n, held)) for n in asked.tasks]
        parts = [NetworkPlan(n, "part", companion, self._part(n, companion)) for n in self._parts]
        one = None
        if self._unet.routed:
            one = NetworkPlan(ALL_TASKS, "shared", asked.precision, self._shared(asked.tasks, held))
        recommended = self._recommend(asked)
        plan = BuildPlan(
            self._target.spec.name,
            asked.precision,
            (*tasks, *parts),
            self._workspace,
            self._reserved,
            self._device_bytes,
            one,
            recommended.routing if asked.routing == "auto" else asked.routing,
            recommended,
            least_bytes=self._least,
            disk=self._disk(asked),
        )
        if plan.available_bytes is None or plan.fits:
            return plan
        return replace(plan, suggestions=tuple(self._suggest(plan.available_bytes)))

    def _disk(self, options: _Options) -> dict[Routing, int]:
        """By form of routing, bytes of the UNets' graphs: weights that tasks have in common are stored once."""
        forms: dict[Routing, list[ir.Model]] = {"static": [self._unet.static(task) for task in options.tasks]}
        if self._unet.routed:
            forms["shared"] = [self._unet.shared(self._target.spec.shared_batch or self._unet.batch(options.tasks))]
        precision, rest = options.precision, self._rest
        return {form: stored_bytes(graphs, precision=precision, rest=rest) for form, graphs in forms.items()}

    def _device(self, memory: int | None) -> tuple[int, int | None]:
        """What is reserved of the device's memory, and that memory, which may have been given."""
        spec = self._target.spec
        if memory is None:
            return spec.reserved_bytes, self._target.memory()
        others = 0 if spec.shared is None else int(memory * (1 - spec.shared))
        return spec.reserved_bytes + others, memory

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

    def _static(self, task: str, precision: Precision) -> Footprint:
        """The engine of one task."""
        return self._footprint(task, self._unet.static(task), precision)

    def _shared(self, tasks: Sequence[str], precision: Precision) -> Footprint:
        """One engine for ``tasks``, at the largest batch it runs."""
        batch = self._target.spec.shared_batch or self._unet.batch(tasks)
        return self._footprint(f"batch {batch}", self._unet.shared(batch), precision)

    def _part(self, name: str, precision: Precision) -> Footprint:
        return self._footprint(f"part {name}", self._parts[name], precision)

    def _footprint(self, name: str, graph: ir.Model, precision: Precision) -> Footprint:
        if (name, precision) not in self._measured:
            found = footprint(graph, precision=precision, rest=self._rest)
            activations = int(found.activation_bytes * self._target.spec.scratch)
            self._measured[name, precision] = replace(found, activation_bytes=activations)
        return self._measured[name, precision]

    def _unets(self, options: _Options, routing: Routing) -> int:
        """Bytes of the UNets of a bundle in one form of routing."""
        held = self._held(options.precision)
        if routing == "shared":
            found = [self._shared(options.tasks, held)]
        else:
            found = [self._static(name, held) for name in options.tasks]
        scale = 1.0 if options.latent is None else self._scale(options.latent)
        return sum(one.weights_bytes + int(one.activation_bytes * scale) for one in found)

    def _others(self, options: _Options) -> int:
        """Bytes of what a bundle needs beside its UNets."""
        companion, whole = self._companion(options.precision), self._unet.latent
        area = 1.0 if options.latent is None else options.latent[0] * options.latent[1] / (whole[0] * whole[1])
        total = self._workspace
        for name in self._parts:
            memory = self._part(name, companion)
            total += memory.weights_bytes + int(memory.activation_bytes * (area if name.startswith("vae") else 1.0))
        return total

    def _recommend(self, options: _Options) -> Recommendation:
        there = self._least if self._device_bytes is None else max(0, self._device_bytes - self._reserved)
        return recommend(
            len(options.tasks),
            self._unets(options, "static"),
            self._unets(options, "shared") if self._unet.routed else None,
            None if there is None else max(0, there - self._others(options)),
            self._target.spec.name,
            least=self._device_bytes is None,
        )

    def _needs(self, options: _Options) -> int:
        """Bytes of a bundle built with ``options``, everything resident."""
        routing = self._recommend(options).routing if options.routing == "auto" else options.routing
        return self._others(options) + self._unets(options, routing)

    def _scale(self, latent: tuple[int, int]) -> float:
        """Activations of a UNet at ``latent`` as a share of those asked for; the same for every batch and precision."""
        for one in (self._unet.latent, latent):
            if one not in self._scales:
                self._scales[one] = footprint(self._unet.resized(one), precision="fp32").activation_bytes
        whole = self._scales[self._unet.latent]
        return self._scales[latent] / whole if whole else 1.0

    def _suggest(self, available: int) -> Iterator[Suggestion]:
        """What fits by changing one thing; where nothing does, by changing all; the closest if that fails too."""
        asked, sharing = self._asked, self._sharing()
        found = [self._suggestion(replace(asked, precision=p), available) for p in self._smaller_precisions()]
        if sharing != asked:
            found.append(self._suggestion(sharing, available))
        if (fewer := self._fewer(asked, available)) not in ((), asked.tasks):
            found.append(self._suggestion(replace(asked, tasks=fewer), available))
        found.extend(self._smaller_size(asked, available))
        if not any(one.fits for one in found):
            alternatives = [replace(sharing, precision=p) for p in (asked.precision, *self._smaller_precisions())]
            smallest = min(alternatives, key=self._needs)
            least = min(asked.tasks, key=lambda task: self._needs(replace(smallest, tasks=(task,))))
            smallest = replace(smallest, tasks=self._fewer(smallest, available) or (least,))
            if len(smallest.tasks) == 1:
                smallest = replace(smallest, routing=asked.routing)
            if smallest != asked:
                found.append(self._suggestion(smallest, available))
            found.extend(self._smaller_size(smallest, available))
        yield from found

    def _sharing(self) -> _Options:
        """What was asked for with one engine for all tasks, if that takes less."""
        sharing = replace(self._asked, routing="shared")
        possible = self._asked.routing == "static" and self._unet.routed and len(self._asked.tasks) > 1
        return sharing if possible and self._needs(sharing) < self._needs(self._asked) else self._asked

    def _suggestion(self, options: _Options, available: int) -> Suggestion:
        needs = self._needs(options)
        return Suggestion(self._typed(options), needs, needs <= available)

    def _typed(self, options: _Options) -> str:
        """What is typed after ``build`` to change what was asked for into ``options``."""
        words = []
        if options.precision != self._asked.precision:
            words.append(f"--{options.precision}")
        if options.routing != self._asked.routing:
            words.append(f"--routing {options.routing}")
        if options.tasks != self._asked.tasks:
            words.extend(f"--task {task}" for task in options.tasks)
        if options.latent is not None:
            height, width = (side * self._pixels for side in options.latent)
            words.append(f"--size {width}x{height}")
        return " ".join(words)

    def _smaller_precisions(self) -> list[Precision]:
        now = self._needs(self._asked)
        return [p for p in self._target.spec.precisions if self._needs(replace(self._asked, precision=p)) < now]

    def _fewer(self, options: _Options, available: int) -> tuple[str, ...]:
        """As many tasks as fit together, smallest first, in the model's own order; none if not even one fits."""
        chosen: list[str] = []
        for task in sorted(options.tasks, key=lambda task: self._needs(replace(options, tasks=(task,)))):
            if self._needs(replace(options, tasks=(*chosen, task))) <= available:
                chosen.append(task)
        return tuple(task for task in options.tasks if task in chosen)

    def _smaller_size(self, options: _Options, available: int) -> Iterator[Suggestion]:
        """The largest smaller size that fits, else the smallest there is."""
        last = None
        for latent in self._smaller_latents():
            last = self._suggestion(replace(options, latent=latent), available)
            if last.fits:
                break
        if last is not None:
            yield last

    def _smaller_latents(self) -> Iterator[tuple[int, int]]:
        if self._pixels == 0:
            return
        height, width = self._unet.latent
        for eighths in _EIGHTHS:
            smaller = height * eighths // 8, width * eighths // 8
            if all(side >= _LATENT_STEP and side % _LATENT_STEP == 0 for side in smaller):
                yield smaller

    @cached_property
    def _pixels(self) -> int:
        """Pixels of a picture along one row of the latent; 0 without a decoder."""
        decoder = self._parts.get("vae_decoder")
        shape = None if decoder is None else decoder.graph.outputs[0].shape
        return 0 if shape is None else shape.numpy()[2] // self._unet.latent[0]


def _part(path: Path) -> ir.Model:
    """A part of the pipeline as it is run; its shapes are kept, its weights are not."""
    model = graph_io.load(path)
    if any(value.shape is None or not value.shape.is_static() for value in model.graph.inputs):
        context = passes.PassContext(batch=_PROMPTS)
        for one in passes.builtin().pipeline(("mtu::freeze-shapes",)):
            one.requires(model, context)
            one.run(model, context)
    return model
