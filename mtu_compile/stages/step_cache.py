"""Fewer whole UNet steps: the shallow UNet cut out of a lowered one, and the schedule with the fewest whole steps.

See docs/decisions/0030-step-cache.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import passes
from mtu_compile import bundle
from mtu_compile.accuracy.cached import LIMITS, cannot_reach, judge_cached, surely_reached
from mtu_compile.accuracy.host.check import host_opener
from mtu_compile.accuracy.host.perceptual import perceptual
from mtu_compile.accuracy.measuring import measure_picture
from mtu_compile.accuracy.task_metrics import PictureMetrics
from mtu_compile.accuracy.verdict import WITHOUT_TORCH
from mtu_compile.bundle.step_cache import StepCache, TriedSchedule
from mtu_compile.core.amounts import readable
from mtu_compile.core.atomic import scratch
from mtu_compile.core.progress import Progress
from mtu_compile.graph import io as graph_io
from mtu_compile.runtime import Runtime
from mtu_compile.runtime.reference import Reference
from mtu_compile.stages.job import Cut, Drawing, Lowered, Model, Rows, Specialised, StepCacheChoice
from mtu_compile.stages.observe import recorded
from mtu_compile.stages.specialise import pass_records
from mtu_compile.steps import Steps, Work, step
from passes.deep_feature import deep_value
from targets.base import Target
from targets.costs.roofline import multiply_adds

#: What cuts graphs.
TOOLS = ("onnx", "onnx-ir", "numpy")

#: Pictures that a schedule is tried on: rows that are checked with, of other noise. On rows that it was trained on a
#: network is so sure of itself that hardly any step has to be whole, and on others the pictures then fail.
PICTURES = 8

#: Largest interval between whole steps where nobody says: with more, text-to-image fails on the example.
MOST = 8

#: Added to the seed of the rows' pictures, so that no check meets their noise.
SEED_OFFSET = 7_000

#: How whole steps are placed among the others: name → exponent of the spacing (1 is even, more is denser at first),
#: and slope of the deep feature.
PLACEMENTS: Mapping[str, tuple[float, float]] = {"even": (1.0, 1.0), "early": (1.3, 1.0), "even, half": (1.0, 0.5)}


@dataclass(frozen=True)
class Caching:
    """What schedules are chosen by.

    Attributes:
        most: largest interval between whole steps.
        references: by task, float pictures to be reached.
        limits: by task, what its pictures have to reach.
    """

    most: int
    references: Mapping[str, Path]
    limits: Mapping[str, Mapping[str, float | None]]


def require_cut(unets: Mapping[str, Specialised]) -> None:
    """``PassError``, before anything is calibrated, for a UNet that cannot be cut."""
    for unet in unets.values():
        deep_value(graph_io.load(unet.graph))


def cut_unet(steps: Steps, lowered: Lowered, label: str) -> Cut:
    """The lowered graph of a UNet as a whole and a shallow one.

    Raises:
        PassError: it cannot be cut.
    """
    done = steps.run(cut.of(f"cut {label}", lowered.graph, label))
    steps.progress.tell(
        f"--step-cache: the shallow UNet of {label} has {done.share:.1%} of the operations, and takes about "
        f"{readable(done.shallow_bytes)} of memory for its weights beside the whole one"
    )
    return done


@step(tools=TOOLS)
def cut(work: Work, graph: Path, label: str) -> Cut:
    """``graph`` with the deep feature as an output, and with it as an input; ``label``: whose it is."""
    whole, shallow, context = work.folder / "whole.onnx", work.folder / "shallow.onnx", passes.PassContext()
    with work.progress.stage(f"cut {label}"):
        done = (
            *passes.run_pipeline(graph, whole, ("mtu::emit-deep-feature",), context),
            *passes.run_pipeline(graph, shallow, ("mtu::take-deep-feature",), context),
        )
    share = operations(shallow) / max(operations(whole), 1)
    return Cut(whole, shallow, pass_records(done), round(share, 4), graph_io.weight_bytes(graph_io.load(shallow)))


def operations(graph: Path) -> int:
    """Multiply-adds of a graph, for one sample where its batch is free."""
    model = graph_io.load(graph)
    freeze = passes.builtin().pipeline(("mtu::freeze-shapes",))
    (frozen,) = passes.run_passes(model, freeze, passes.PassContext(batch=1))
    return sum(multiply_adds(frozen.graph))


def begin(
    steps: Steps,
    choice: StepCacheChoice | None,
    model: Model,
    rows: Mapping[str, Rows],
    drawing: Drawing,
    limits: Mapping[str, Mapping[str, float | None]],
) -> Caching | None:
    """What schedules are chosen by, after the float original made its pictures; ``None`` where all steps stay whole.

    Args:
        choice: as it was asked for.
        rows: by task, its rows.
        limits: by task, what its pictures have to reach, over ``LIMITS``.
    """
    if choice is None:
        return None
    other = replace(drawing, seed=drawing.seed + SEED_OFFSET)
    calls = [
        recorded.of(
            f"reference of the step cache {task.name}",
            model.checkpoint,
            task.name,
            ((rows[task.name].checking or rows[task.name].calibrating) * PICTURES)[:PICTURES],
            model.size,
            other,
        )
        for task in model.tasks
    ]
    references = {task.name: file for task, file in zip(model.tasks, steps.run_all(calls), strict=True)}
    asked = {task.name: {**LIMITS, **limits.get(task.name, {})} for task in model.tasks}
    return Caching(MOST if choice == "auto" else choice, references, asked)


def choose(
    manifest: bundle.Manifest, caching: Caching, target: Target, folder: Path, progress: Progress
) -> dict[str, bundle.TaskEntry]:
    """By task, its entry with the schedule of fewest whole steps that reaches its limits.

    A task for which none does has no step cache, and its provenance says why.

    Args:
        manifest: of the bundle in ``folder``, in the making, whose step caches have no schedules yet.
    """
    entries = {}
    with scratch("mtu-schedule") as work:
        opener = None if target.device_here() else host_opener(target, folder, work)
        with Runtime(folder, manifest, opener) as loaded:
            for name, entry in manifest.tasks.items():
                with progress.stage(f"schedule {name}"):
                    reference = Reference.load(caching.references[name])
                    entries[name] = _Search(loaded, entry, reference, caching.most, caching.limits[name]).run()
                if manifest.routing == "static":
                    loaded.close()  # one UNet in memory at a time
    before, after = (
        {one.step_cache.engine.path for one in tasks.values() if one.step_cache is not None}
        for tasks in (manifest.tasks, entries)
    )
    for path in before - after:
        shutil.rmtree((folder / path).parent)
    return entries


class _Search:
    """The schedule of one task: fewer whole steps as long as the pictures reach the limits.

    How good pictures are grows with the number of whole steps, by and large, so that number is found by bisection;
    whatever is taken was tried.
    """

    def __init__(
        self,
        loaded: Runtime,
        entry: bundle.TaskEntry,
        reference: Reference,
        most: int,
        limits: Mapping[str, float | None],
    ) -> None:
        assert entry.step_cache is not None and entry.provenance.step_cache is not None
        self._loaded, self._entry, self._reference = loaded, entry, reference
        self._cache, self._record = entry.step_cache, entry.provenance.step_cache
        self._most, self._limits, self._tried = most, limits, list[TriedSchedule]()
        self._measures = perceptual() if limits.get("vif") is not None else WITHOUT_TORCH
        self._timesteps = reference.trajectories[0].timesteps

    def run(self) -> bundle.TaskEntry:
        calls, taken = len(self._timesteps), None
        few, many = max(ceil(calls / self._most), 1), calls - 1
        while few <= many:
            middle = (few + many) // 2
            found = next((one for one in self._candidates(middle) if self._reaches(one)), None)
            if found is None:
                few = middle + 1
            else:
                taken, many = found, middle - 1
        reason = None if taken is not None else self._reason()
        record = replace(
            self._record,
            most=self._most,
            pictures=len(self._reference.trajectories),
            tried=tuple(self._tried),
            reason=reason,
        )
        provenance = replace(self._entry.provenance, step_cache=record)
        return replace(self._entry, step_cache=taken, provenance=provenance)

    def _reason(self) -> str:
        limits = ", ".join(f"{name} {limit:g}" for name, limit in self._limits.items() if limit is not None)
        return f"no schedule with an interval of at most {self._most} reaches {limits}: every step is whole"

    def _candidates(self, whole: int) -> Iterator[StepCache]:
        seen = set()
        for power, slope in PLACEMENTS.values():
            places = spread(len(self._timesteps), whole, power)
            if largest_interval(places, len(self._timesteps)) > self._most or (places, slope) in seen:
                continue
            seen.add((places, slope))
            times = tuple(self._timesteps[place] for place in places)
            yield replace(self._cache, whole_at=times, slope=slope, limits=dict(self._limits))

    def _reaches(self, cache: StepCache) -> bool:
        entry = replace(self._entry, step_cache=cache)
        manifest = self._loaded.manifest
        self._loaded.manifest = replace(manifest, tasks={**manifest.tasks, entry.task.name: entry})
        trajectories, pictures = self._reference.trajectories, list[PictureMetrics]()
        try:
            for one in trajectories:
                made = self._loaded.run(
                    entry.task.name,
                    one.prompt,
                    image=one.image,
                    mask=one.mask,
                    steps=self._reference.steps,
                    seed=one.seed,
                    latents=one.noise,
                    paste_unmasked=False,
                )
                pictures.append(measure_picture(one, made, entry.task, self._measures, manifest.fit))
                if cannot_reach(pictures, len(trajectories), self._limits):
                    break
        finally:
            self._loaded.manifest = manifest
        passed = len(pictures) == len(trajectories) and surely_reached(pictures, self._limits)
        judged = judge_cached(pictures, self._limits)
        metrics = {name: judged.metrics[name] for name in self._limits} | {"least_ssim": judged.least_ssim}
        whole = tuple(self._timesteps.index(time) for time in cache.whole_at)
        self._tried.append(TriedSchedule(whole, cache.slope, metrics, len(pictures), passed))
        return passed


def spread(calls: int, whole: int, power: float) -> tuple[int, ...]:
    """Indices of ``whole`` of ``calls`` calls, the first among them: evenly spaced, or denser at first with a ``power``
    above 1."""
    places = {round(calls * (turn / whole) ** power) for turn in range(whole)}
    free = iter(sorted(set(range(calls)) - places))
    while len(places) < whole:  # where rounding made two of them one
        places.add(next(free))
    return tuple(sorted(places))


def largest_interval(places: Sequence[int], calls: int) -> int:
    """Calls from one whole call to the next, at most."""
    return max(after - before for before, after in zip(places, (*places[1:], calls), strict=True))
