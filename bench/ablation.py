"""What each part of quantising is worth: calibration data, timesteps, ranges, SmoothQuant, mixed precision.

    python -m bench.ablation                every row for every task (about an hour on two cores)
    python -m bench.ablation --tasks t2i inpaint

Every row quantises the same static graphs with NNCF and as many UNet calls, lowers them as the CPU target does and is
checked on the same held-out pictures. Needs a bundle of ``bench.eval``. Writes ``build/bench/ablation.json`` and the
table in ``docs/accuracy.md``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import passes
import targets
from bench import eval as evaluation
from bench import held_out, timing
from calibration import quant_config
from calibration.baselines import prompts_only, random_set
from calibration.capture import capture
from calibration.quant_settings import QuantSettings
from calibration.quantize import quantize_onnx
from calibration.samples import split_samples
from calibration.sets import CalibrationSet
from mtu_compile.core.hashing import model_sha256
from mtu_compile.core.progress import Progress
from mtu_compile.model.pipeline import MTUPipeline
from mtu_compile.stages.export import exported_unet
from mtu_compile.stages.job import Checkpoint, Model, Specialised, Workload
from mtu_compile.stages.precision import INT8
from mtu_compile.stages.running import running
from mtu_compile.stages.specialise import specialise

BUILT = next(iter(evaluation.BUILDS))
NNCF_DEFAULT = replace(INT8, range_estimator="mean-minmax", weight_bits_fix=True)

#: Name of a row → which calibration set, which settings; ``None`` for those the search chose.
ROWS: Mapping[str, tuple[str, QuantSettings | None]] = {
    "random numbers": ("random numbers", INT8),
    "prompts only, no pictures": ("prompts only", INT8),
    "real, the same timesteps of every picture": ("uniform", INT8),
    "real, timesteps drawn by chance": ("random", INT8),
    "real, stratified timesteps (ours)": ("stratified", INT8),
    "… with NNCF's default ranges": ("stratified", NNCF_DEFAULT),
    "… with SmoothQuant 0.5": ("stratified", replace(INT8, smooth_quant_alpha=0.5)),
    "… with SmoothQuant 0.95 (NNCF's default)": ("stratified", replace(INT8, smooth_quant_alpha=0.95)),
    "… without bias correction": ("stratified", replace(INT8, fast_bias_correction=False)),
    "ours with mixed precision (as built)": ("stratified", None),
}


def calibration_sets(pipeline: MTUPipeline, one: Specialised, sha256: str, pictures: int, steps: int) -> dict[str, Any]:
    """By strategy, a set of equally many calls of one task."""
    (task,) = one.tasks.values()
    rows, _ = split_samples(held_out.MODEL / "samples", task, calibrating=pictures, checking=4)
    common: dict[str, Any] = {"model_sha256": sha256, "steps": steps}
    sets: dict[str, Any] = {
        sampling: capture(pipeline, task, rows, sampling=sampling, **common)  # type: ignore[arg-type]
        for sampling in ("stratified", "uniform", "random")
    }
    sets["prompts only"] = prompts_only(pipeline, task, rows, **common)
    calls = len(sets["stratified"].inputs)
    sets["random numbers"] = random_set(one.graph, calls=calls, task=task.name, model_sha256=sha256)
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*")
    parser.add_argument("--pictures", type=int, default=8, help="held-out rows a task")
    parser.add_argument("--calibration-pictures", type=int, default=12)
    args = parser.parse_args()
    built = evaluation.built(BUILT, evaluation.BUILDS[BUILT])
    chosen = quant_config.load(built)
    wanted = held_out.references(args.pictures)
    results: dict[str, dict[str, Any]] = {name: {} for name in ROWS}
    pipeline, sha256 = MTUPipeline.from_pretrained(held_out.MODEL), model_sha256(held_out.MODEL)
    names = args.tasks or [task.name for task in pipeline.unet.tasks]
    with running(None, Path(tempfile.gettempdir()), Progress()) as steps:
        selected = tuple(task for task in pipeline.unet.tasks if task.name in names)
        checkpoint = Checkpoint(held_out.MODEL, sha256)
        model = Model(checkpoint, pipeline, selected, pipeline.resolve_size(None, None))
        unets = specialise(steps, steps.run(exported_unet.of("export the UNet", checkpoint)), model)
        for name, one in unets.items():
            sets = calibration_sets(pipeline, one, sha256, args.calibration_pictures, Workload.steps)
            for label, (strategy, settings) in ROWS.items():
                graph = quantised(one, sets[strategy], settings or chosen[name])
                checks = held_out.check(built, wanted, tasks=[name], opener=held_out.opener(built, name, graph))
                results[label][name] = evaluation.figures(checks[name])
                print(f"{name}: {label}: SSIM {results[label][name]['ssim']:.4f}", flush=True)
            write(results, args.pictures)


def write(results: Mapping[str, Mapping[str, Any]], pictures: int) -> None:
    """What is known so far: a task takes minutes, and all of them an hour."""
    timing.write("ablation", {"pictures": pictures, "results": results})
    names = list(next(iter(results.values())))
    columns = ["quantised with", *names]
    rows = [[label, *(cell(found[name]) for name in names)] for label, found in results.items()]
    held_out.into_docs(evaluation.PAGE, "ablation", held_out.markdown(columns, rows))


def quantised(one: Specialised, calibration: CalibrationSet, settings: QuantSettings) -> Path:
    """One row's graph, lowered for the CPU."""
    int8, lowered = one.graph.with_name("row.onnx"), one.graph.with_name("row-lowered.onnx")
    quantize_onnx(one.graph, calibration, int8, settings=settings)
    passes.run_pipeline(int8, lowered, targets.get("cpu").spec.lowering["int8"], passes.PassContext())
    return lowered


def cell(found: Mapping[str, Any]) -> str:
    ratio = "-" if found["guidance_ratio"] is None else "{:.2f}-{:.2f}".format(*found["guidance_ratio"])
    return f"{found['worst_sqnr_db']:.1f} / {found['mean_sqnr_db']:.1f}, {ratio}, {found['ssim']:.4f}"


if __name__ == "__main__":
    main()
