"""From a UNet's float graph to the graph of the precision a build asks for: quantised, compressed, lowered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import passes
from calibration.aligning import align
from calibration.compress import CompressSettings, compress_onnx
from calibration.dequantise import dequantise_onnx
from calibration.fp8 import to_fp8
from calibration.quant_settings import QuantSettings
from calibration.quantize import QuantisationReport, quantize_onnx
from calibration.ranges import graph_ranges
from mtu_compile import bundle
from mtu_compile.bundle.quantisation import AlignmentRecord, CompressionRecord, MixedRecord, QuantisationRecord
from mtu_compile.core.errors import BuildError
from mtu_compile.core.schema import conform
from mtu_compile.stages.float_layers import choose_layers
from mtu_compile.stages.job import Lowered, QuantRecipe, Specialised
from mtu_compile.stages.quantising import TOOLS, inputs_of, merged_inputs
from mtu_compile.stages.specialise import pass_records
from mtu_compile.steps import Steps, Work, step
from targets.base import Precision, Target

#: Precisions of the weights alone, which need no calibration, and how they are made. INT4 in blocks of 64 and for all
#: linear layers: with 32 or 128, or a fifth to a half of them in INT8, the emoji example's UNets are within 1.5 dB.
COMPRESSED: Mapping[Precision, CompressSettings] = {
    "int8-weights": CompressSettings("int8"),
    "int4-weights": CompressSettings("int4", ratio=1.0, group_size=64),
}

#: What a UNet is quantised with. Time embedding, first and last convolution cost next to nothing and stay float. What
#: each setting gains or loses on the emoji example is in docs/accuracy.md.
INT8 = QuantSettings(
    smooth_quant_alpha=None,
    range_estimator="histogram",
    ignored_scopes=("time_embedding.*", ".*time_emb_proj.*", "conv_in.*", "conv_out.*"),
)


@dataclass(frozen=True)
class Aligned:
    """A graph of several tasks in the range of one scale, and how it came there."""

    graph: Path
    record: AlignmentRecord


@dataclass(frozen=True)
class Quantised:
    """A graph in INT8, and what NNCF did."""

    graph: Path
    report: QuantisationReport


@dataclass(frozen=True)
class Compressed:
    """A graph with weights in 8 or 4 bits, and what was done to make it."""

    graph: Path
    record: CompressionRecord


@dataclass(frozen=True)
class Finished:
    """A quantised graph with the layers in float that stay so, and in the 8 bits asked for; and what is said of it.

    Attributes:
        graph: ``None``: as it was quantised.
        record: for the manifest.
    """

    graph: Path | None
    record: QuantisationRecord


@dataclass(frozen=True)
class Rewritten:
    """A graph as a target takes it, and the passes that made it so."""

    graph: Path
    passes: tuple[bundle.PassRecord, ...]


def lower_unet(
    steps: Steps,
    target: Target,
    precision: Precision,
    unet: Specialised,
    sets: Mapping[str, Path],
    recipe: QuantRecipe,
) -> Lowered:
    """A UNet's graph in ``precision``, as ``target`` takes it: quantised with calibration sets, or compressed.

    Args:
        sets: by task, files of inputs of the UNet; none where ``precision`` is not calibrated.
        recipe: how it is quantised.

    Raises:
        CalibrationError, PassError: a graph or inputs that cannot be quantised.
    """
    graph, quantisation, compression = unet.graph, dict[str, QuantisationRecord](), None
    if sets:
        unet, graph, quantisation = quantise(steps, target, precision, unet, sets, recipe)
    if precision in COMPRESSED:
        done = steps.run(compressed.of(f"compress {unet.label}", unet, precision))
        graph, compression = done.graph, done.record
    lowered, passed = lower(steps, target, graph, precision, original=unet.graph, label=unet.label)
    return Lowered(lowered, passed, quantisation, compression)


def quantise(
    steps: Steps,
    target: Target,
    precision: Precision,
    unet: Specialised,
    sets: Mapping[str, Path],
    recipe: QuantRecipe,
) -> tuple[Specialised, Path, dict[str, QuantisationRecord]]:
    """The UNet as it was quantised, its Q/DQ graph in ``precision``, and by task what was done to make it.

    A UNet of several tasks is aligned first: each of them is brought into the range of the one scale a layer has.
    """
    settings, aligned = recipe.settings or INT8, None
    chosen: Mapping[str, MixedRecord] = {}
    float_layers: tuple[str, ...] = ()
    if unet.shared:
        aligned = steps.run(aligned_unet.of(f"align {unet.label}", unet, sets, settings))
        unet = replace(unet, graph=aligned.graph)
    int8 = steps.run(int8_unet.of(f"quantise {unet.label}", unet, sets, settings))
    if recipe.settings is None and recipe.search and precision == "int8":
        chosen = choose_layers(steps, target, unet, sets, int8.graph)
        float_layers = next(iter(chosen.values())).float_layers
        if len(float_layers) == sum(done for done, _ in int8.report.layers.values()):
            raise BuildError(
                f"no layer of {unet.label} is worth INT8 on {target.spec.name}: each is slower than in float, or "
                "costs too much accuracy",
                hint="build in a float precision, or with --no-mixed-precision all the same",
            )
    done = steps.run(finished.of(f"finish {unet.label}", unet, int8, float_layers, precision))
    records = {
        task.name: replace(
            done.record,
            mixed=chosen.get(task.name),
            config=recipe.config,
            alignment=None if aligned is None else aligned.record,
        )
        for task in unet.tasks.values()
    }
    return unet, done.graph or int8.graph, records


@step(tools=TOOLS, cpu=True)
def aligned_unet(work: Work, unet: Specialised, sets: Mapping[str, Path], settings: QuantSettings) -> Aligned:
    """The UNet of several tasks with each of them in the range of the one scale that every layer has in INT8."""
    merged = merged_inputs(unet, sets)
    out, inputs = work.folder / "aligned.onnx", {name: merged.of_task(name) for name in merged.sets}
    with work.progress.stage(f"align {unet.label}", sum(map(len, inputs.values()))) as advance:
        report = align(unet.graph, out, inputs, quantisation=settings, progress=advance)
    return Aligned(out, conform(AlignmentRecord, report.to_json()))


@step(tools=TOOLS, cpu=True)
def int8_unet(work: Work, unet: Specialised, sets: Mapping[str, Path], settings: QuantSettings) -> Quantised:
    """The UNet with every layer in INT8 that ``settings`` do not leave out."""
    calibration, out = inputs_of(unet, sets), work.folder / "int8.onnx"
    with work.progress.stage(f"quantise {unet.label}", len(calibration.inputs)) as advance:
        report = quantize_onnx(unet.graph, calibration, out, settings=settings, progress=lambda done, total: advance(1))
    return Quantised(out, report)


@step(tools=TOOLS)
def finished(
    work: Work, unet: Specialised, int8: Quantised, float_layers: tuple[str, ...], precision: Precision
) -> Finished:
    """The quantised UNet with ``float_layers`` in float again, or in FP8, and what is said of it."""
    graph, report = int8.graph, int8.report
    with work.progress.stage(f"finish {unet.label}"):
        if float_layers:
            graph = work.folder / "int8.onnx"
            report = dequantise_onnx(int8.graph, unet.graph, float_layers, report, graph)
        done = {**report.to_json(), "ranges": graph_ranges(graph)}
        if precision == "fp8":
            before, graph = graph, work.folder / "fp8.onnx"
            done["fp8"] = to_fp8(before, unet.graph, graph).to_json()
    return Finished(None if graph == int8.graph else graph, conform(QuantisationRecord, done))


@step(tools=TOOLS)
def compressed(work: Work, unet: Specialised, precision: Precision) -> Compressed:
    """The UNet's graph with INT8 or INT4 weights, and what was done to make it."""
    with work.progress.stage(f"compress {unet.label}"):
        graph = work.folder / "compressed.onnx"
        report = compress_onnx(unet.graph, graph, settings=COMPRESSED[precision])
        return Compressed(graph, conform(CompressionRecord, report.to_json()))


def lower(
    steps: Steps,
    target: Target,
    graph: Path,
    precision: Precision,
    *,
    label: str,
    original: Path | None = None,
) -> tuple[Path, tuple[bundle.PassRecord, ...]]:
    """Run the passes the target wants before it builds in ``precision``.

    Args:
        label: what it is, for people.
        original: the float graph that ``graph`` was quantised from, if it is quantised.
    """
    ids = target.spec.lowering.get(precision, ())
    if not ids:
        return graph, ()
    done = steps.run(lowered.of(f"lower {label}", graph, ids, original, label))
    return done.graph, done.passes


@step(tools=TOOLS)
def lowered(work: Work, graph: Path, ids: tuple[str, ...], original: Path | None, label: str) -> Rewritten:
    """``graph`` after the passes called ``ids``."""
    with work.progress.stage(f"lower {label}"):
        out, context = work.folder / f"{graph.stem}-lowered.onnx", passes.PassContext(original=original)
        return Rewritten(out, pass_records(passes.run_pipeline(graph, out, ids, context)))
