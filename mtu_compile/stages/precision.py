"""From a UNet's float graph to the graph of the precision a build asks for: quantised, compressed, lowered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import passes
from calibration.aligning import align
from calibration.compress import CompressSettings, compress_onnx
from calibration.dequantise import dequantise_onnx
from calibration.fp8 import to_fp8
from calibration.merged import MergedSet
from calibration.mixed import Effort, TaskInputs, choose_for_all
from calibration.mixed.times import compare_costs_at
from calibration.quant_settings import QuantSettings
from calibration.quantize import QuantisationReport, quantize_onnx
from calibration.ranges import graph_ranges
from calibration.sets import CalibrationSet
from calibration.switched_graph import SwitchedGraph
from mtu_compile import bundle
from mtu_compile.bundle import encode
from mtu_compile.bundle.quantisation import AlignmentRecord, CompressionRecord, MixedRecord, QuantisationRecord
from mtu_compile.core.errors import BuildError
from mtu_compile.core.progress import Progress
from mtu_compile.core.schema import conform
from mtu_compile.graph import io as graph_io
from mtu_compile.stages.job import Lowered, QuantRecipe, Specialised
from mtu_compile.stages.specialise import pass_records
from targets.base import Precision, Target
from targets.costs.layers import compare_costs

#: Precisions of the weights alone, which need no calibration, and how they are made. INT4 in blocks of 64 and for all
#: linear layers: with 32 or 128, or a fifth to a half of them in INT8, the emoji example's UNets are within 1.5 dB.
COMPRESSED: Mapping[Precision, CompressSettings] = {
    "int8-weights": CompressSettings("int8"),
    "int4-weights": CompressSettings("int4", ratio=1.0, group_size=64),
}

#: Passes that change the type of what is not quantised, and leave the quantised layers as they are.
HALF: tuple[str, ...] = ("mtu::to-fp16", "mtu::to-bf16")

#: What a UNet is quantised with. Time embedding, first and last convolution cost next to nothing and stay float. What
#: each setting gains or loses on the emoji example is in docs/accuracy.md.
INT8 = QuantSettings(
    smooth_quant_alpha=None,
    range_estimator="histogram",
    ignored_scopes=("time_embedding.*", ".*time_emb_proj.*", "conv_in.*", "conv_out.*"),
)


def lower_unet(
    target: Target,
    precision: Precision,
    unet: Specialised,
    sets: Mapping[str, CalibrationSet],
    recipe: QuantRecipe,
    progress: Progress,
) -> Lowered:
    """A UNet's graph in ``precision``, as ``target`` takes it: quantised with calibration sets, or compressed.

    Args:
        sets: by task, inputs of the UNet; none where ``precision`` is not calibrated.
        recipe: how it is quantised.

    Raises:
        CalibrationError, PassError: a graph or inputs that cannot be quantised.
    """
    graph, quantisation, compression = unet.graph, dict[str, QuantisationRecord](), None
    if sets and unet.shared:
        merged = MergedSet.of(sets, unet.tasks, channels=unet.width)
        unet, aligned = align_ranges(unet, merged, recipe, progress)
        graph, found = quantise(target, precision, unet, merged, recipe, progress)
        quantisation = {name: replace(one, alignment=aligned) for name, one in found.items()}
    elif sets:
        graph, quantisation = quantise(target, precision, unet, sets[unet.name], recipe, progress)
    if precision in COMPRESSED:
        graph, compression = compress(precision, unet, progress)
    with progress.stage(f"lower {unet.label}"):
        lowered, done = lower(target, graph, precision, original=unet.graph)
    return Lowered(lowered, done, quantisation, compression)


def align_ranges(
    unet: Specialised, sets: MergedSet, recipe: QuantRecipe, progress: Progress
) -> tuple[Specialised, AlignmentRecord]:
    """The UNet of several tasks with each of them in the range of the one scale that every layer has in INT8."""
    out, inputs = unet.graph.with_name("aligned.onnx"), {name: sets.of_task(name) for name in sets.sets}
    with progress.stage(f"align {unet.label}", sum(map(len, inputs.values()))) as advance:
        report = align(unet.graph, out, inputs, quantisation=recipe.settings or INT8, progress=advance)
    return replace(unet, graph=out), conform(AlignmentRecord, report.to_json())


def quantise(
    target: Target,
    precision: Precision,
    unet: Specialised,
    calibration: CalibrationSet | MergedSet,
    recipe: QuantRecipe,
    progress: Progress,
) -> tuple[Path, dict[str, QuantisationRecord]]:
    """The UNet's Q/DQ graph in ``precision``, and by task what was done to make it."""
    int8, chosen = unet.graph.with_name("int8.onnx"), dict[str, MixedRecord]()
    report = _run_nncf(unet, calibration, int8, recipe.settings or INT8, progress)
    if recipe.settings is None and recipe.search and precision == "int8":
        chosen = _choose(target, unet, calibration, int8, progress)
        kept = next(iter(chosen.values())).float_layers
        if len(kept) == sum(done for done, _ in report.layers.values()):
            raise BuildError(
                f"no layer of {unet.label} is worth INT8 on {target.spec.name}: each is slower than in float, or "
                "costs too much accuracy",
                hint="build in a float precision, or with --no-mixed-precision all the same",
            )
        if kept:
            report = dequantise_onnx(int8, unet.graph, kept, report)
    graph, done = int8, {**report.to_json(), "ranges": graph_ranges(int8), "config": recipe.config}
    if precision == "fp8":
        graph = unet.graph.with_name("fp8.onnx")
        done["fp8"] = to_fp8(int8, unet.graph, graph).to_json()
    names = [task.name for task in unet.tasks.values()]
    return graph, {name: conform(QuantisationRecord, {**done, "mixed": encode(chosen.get(name))}) for name in names}


def compress(precision: Precision, unet: Specialised, progress: Progress) -> tuple[Path, CompressionRecord]:
    """The UNet's graph with INT8 or INT4 weights, and what was done to make it."""
    with progress.stage(f"compress {unet.label}"):
        graph = unet.graph.with_name("compressed.onnx")
        report = compress_onnx(unet.graph, graph, settings=COMPRESSED[precision])
        return graph, conform(CompressionRecord, report.to_json())


def lower(
    target: Target, graph: Path, precision: Precision, *, original: Path | None = None
) -> tuple[Path, tuple[bundle.PassRecord, ...]]:
    """Run the passes the target wants before it builds in ``precision``.

    Args:
        original: the float graph that ``graph`` was quantised from, if it is quantised.
    """
    ids = target.spec.lowering.get(precision, ())
    if not ids:
        return graph, ()
    lowered, context = graph.with_name(f"{graph.stem}-lowered.onnx"), passes.PassContext(original=original)
    return lowered, pass_records(passes.run_pipeline(graph, lowered, ids, context))


def _choose(
    target: Target, unet: Specialised, calibration: CalibrationSet | MergedSet, int8: Path, progress: Progress
) -> dict[str, MixedRecord]:
    """Measure what INT8 costs and gains each layer, and choose those that stay float; by task, what was measured."""
    effort = Effort.of(graph_io.disk_bytes(unet.graph) // 4)
    if isinstance(calibration, MergedSet):
        tasks, effort = TaskInputs.of_each(calibration), effort.split(len(unet.tasks))
    else:
        tasks = {task.name: TaskInputs(calibration.inputs, task.guided) for task in unet.tasks.values()}
    with progress.stage(f"time layers {unet.label}"):
        in_float, _ = lower(target, unet.graph, target.companion_precision("int8"))
        quantised, _ = lower(target, int8, "int8", original=unet.graph)
        compare = compare_costs
        if isinstance(calibration, MergedSet):
            compare = partial(compare_costs_at, batch=target.spec.shared_batch or calibration.batch)
        costs = compare(target, in_float, quantised, rounds=effort.rounds)
    multiplied = _as_multiplied(target, unet, int8)
    switched = SwitchedGraph(unet.graph, multiplied, folder=unet.graph.parent, parallel=effort.parallel)
    with switched as graph:
        total = effort.estimates(len(task.inputs) for task in tasks.values())
        with progress.stage(f"measure layers {unet.label}", total) as advance:
            return choose_for_all(graph, tasks, effort=effort, costs=costs, progress=advance)


def _run_nncf(
    unet: Specialised, calibration: CalibrationSet | MergedSet, out: Path, settings: QuantSettings, progress: Progress
) -> QuantisationReport:
    with progress.stage(f"quantise {unet.label}", len(calibration.inputs)) as advance:
        return quantize_onnx(unet.graph, calibration, out, settings=settings, progress=lambda done, total: advance(1))


def _as_multiplied(target: Target, unet: Specialised, int8: Path) -> Path:
    """``int8`` with the numbers the device multiplies, in float32 still."""
    ids = [name for name in target.spec.lowering.get("int8", ()) if name not in HALF]
    if not ids:
        return int8
    multiplied = int8.with_name(f"{int8.stem}-multiplied.onnx")
    passes.run_pipeline(int8, multiplied, ids, passes.PassContext(original=unet.graph))
    return multiplied
