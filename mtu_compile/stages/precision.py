"""From one task's float graph to the graph of the precision a build asks for: quantised, compressed, lowered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import passes
from calibration.compress import CompressSettings, compress_onnx
from calibration.dequantise import dequantise_onnx
from calibration.fp8 import to_fp8
from calibration.mixed import Effort, MixedPrecision, choose
from calibration.quantize import QuantisationReport, QuantSettings, quantize_onnx
from calibration.ranges import graph_ranges
from calibration.sets import CalibrationSet
from calibration.switches import SwitchedGraph
from mtu_compile import bundle
from mtu_compile.graph import io as graph_io
from mtu_compile.stages.job import Job, Specialised, pass_records
from targets.base import Precision
from targets.costs.layers import compare_costs

#: Precisions that are calibrated.
QUANTISED: tuple[Precision, ...] = ("int8", "fp8")

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


def quantise(job: Job, one: Specialised, calibration: CalibrationSet) -> tuple[Path, dict[str, object]]:
    """The task's Q/DQ graph in the precision asked for, and what was done to make it."""
    int8, precision = one.graph.with_name("int8.onnx"), job.options.precision
    given, chosen = job.settings.get(one.task.name), None
    if given is None and job.options.mixed and precision == "int8":
        report, chosen = _mixed(job, one, calibration, int8)
    else:
        report = _run_nncf(job, one, calibration, int8, given or INT8)
    done = {
        **report.to_json(),
        "ranges": graph_ranges(int8),
        "mixed": None if chosen is None else chosen.to_json(),
        "config": None if job.options.quant_config is None else job.options.quant_config.resolve().name,
    }
    if precision == "int8":
        return int8, done
    fp8 = one.graph.with_name("fp8.onnx")
    return fp8, {**done, "fp8": to_fp8(int8, one.graph, fp8).to_json()}


def compress(job: Job, one: Specialised) -> tuple[Path, dict[str, object]]:
    """The task's graph with INT8 or INT4 weights, and what was done to make it."""
    with job.progress.stage(f"compress {one.task.name}"):
        graph = one.graph.with_name("compressed.onnx")
        return graph, compress_onnx(one.graph, graph, settings=COMPRESSED[job.options.precision]).to_json()


def lower(
    job: Job, graph: Path, precision: Precision, *, original: Path | None = None
) -> tuple[Path, tuple[bundle.PassRecord, ...]]:
    """Run the passes the target wants before it builds in ``precision``.

    Args:
        original: the float graph that ``graph`` was quantised from, if it is quantised.
    """
    ids = job.target.spec.lowering.get(precision, ())
    if not ids:
        return graph, ()
    lowered, context = graph.with_name(f"{graph.stem}-lowered.onnx"), passes.PassContext(original=original)
    return lowered, pass_records(passes.run_pipeline(graph, lowered, ids, context))


def _mixed(
    job: Job, one: Specialised, calibration: CalibrationSet, int8: Path
) -> tuple[QuantisationReport, MixedPrecision]:
    """Quantise to ``int8``, and give back the layers that measurements say should stay float."""
    report = _run_nncf(job, one, calibration, int8, INT8)
    chosen = _choose(job, one, calibration, int8)
    if chosen.float_layers:
        report = dequantise_onnx(int8, one.graph, chosen.float_layers, report)
    return report, chosen


def _choose(job: Job, one: Specialised, calibration: CalibrationSet, int8: Path) -> MixedPrecision:
    """Measure what INT8 costs and gains each layer, and choose those that stay float."""
    name, target = one.task.name, job.target
    effort = Effort.of(graph_io.disk_bytes(one.graph) // 4)
    with job.progress.stage(f"time layers {name}"):
        in_float, _ = lower(job, one.graph, target.companion_precision("int8"))
        quantised, _ = lower(job, int8, "int8", original=one.graph)
        costs = compare_costs(target, in_float, quantised, rounds=effort.rounds)
    switched = SwitchedGraph(
        one.graph, _as_multiplied(job, one, int8), folder=one.graph.parent, parallel=effort.parallel
    )
    with switched as graph:
        total = len(graph.units) * min(effort.calls, len(calibration.inputs))
        with job.progress.stage(f"measure layers {name}", total) as advance:
            inputs, guidance = calibration.inputs, one.task.guided
            return choose(graph, inputs, guidance=guidance, effort=effort, costs=costs, progress=advance)


def _run_nncf(
    job: Job, one: Specialised, calibration: CalibrationSet, out: Path, settings: QuantSettings
) -> QuantisationReport:
    with job.progress.stage(f"quantise {one.task.name}", len(calibration.inputs)) as advance:
        return quantize_onnx(one.graph, calibration, out, settings=settings, progress=lambda done, total: advance(1))


def _as_multiplied(job: Job, one: Specialised, int8: Path) -> Path:
    """``int8`` with the numbers the device multiplies, in float32 still."""
    ids = [name for name in job.target.spec.lowering.get("int8", ()) if name not in HALF]
    if not ids:
        return int8
    multiplied = int8.with_name(f"{int8.stem}-multiplied.onnx")
    passes.run_pipeline(int8, multiplied, ids, passes.PassContext(original=one.graph))
    return multiplied
