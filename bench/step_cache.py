"""Fewer whole UNet steps: speed against quality on the example's held-out rows, and the shallow UNet's share of a step.

    python -m bench.step_cache curve                 builds the example with --step-cache auto, if it is not there
    python -m bench.step_cache curve --bundle DIR    of a bundle that was built so
    python -m bench.step_cache sd15                  whole and shallow step at Stable Diffusion 1.5's size

Quality is that of pictures against the float original's, which caches nothing, from the same noise and with the same 20
steps; no row was used for calibration, or to choose a schedule. Times are of whole pictures, interleaved. ``curve``
writes ``build/bench/step-cache.json``, and the table and the figure of ``docs/benchmarks.md``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import passes
from bench import held_out, timing
from mtu_compile import runtime
from mtu_compile.accuracy.formulas import psnr_db, ssim
from mtu_compile.bundle import StepCache
from mtu_compile.compile import BuildOptions, build
from mtu_compile.graph import io as graph_io
from mtu_compile.runtime.reference import Reference, Trajectory
from mtu_compile.stages.step_cache import spread
from passes.base import PassContext

WORK = Path("build/bench/step-cache")
PAGE, FIGURE = Path("docs/benchmarks.md"), Path("docs/step-cache.svg")

#: Whole steps of the curve, of 20, evenly spread.
CURVE = (4, 6, 10)
#: Steps of the sampler without any cache, for comparison.
FEWER = (7, 10)

Maker = Callable[[Trajectory], runtime.Result]


def maker(loaded: runtime.Runtime, task: str, cache: StepCache | None, steps: int) -> Maker:
    """Makes a trajectory's picture again, with ``cache`` instead of the bundle's own."""

    def make(one: Trajectory) -> runtime.Result:
        manifest = loaded.manifest
        entry = replace(manifest.tasks[task], step_cache=cache)
        loaded.manifest = replace(manifest, tasks={**manifest.tasks, task: entry})
        try:
            return loaded.run(
                task,
                one.prompt,
                image=one.image,
                mask=one.mask,
                steps=steps,
                seed=one.seed,
                latents=one.noise,
                paste_unmasked=False,
            )
        finally:
            loaded.manifest = manifest

    return make


def makers(loaded: runtime.Runtime, task: str, timesteps: Sequence[float]) -> dict[str, Maker]:
    """By name, every way to make a picture that is compared; the first is with all steps whole."""
    steps, entry = len(timesteps), loaded.manifest.tasks[task]
    chosen = entry.step_cache
    ways = {"all whole": maker(loaded, task, None, steps)}
    if chosen is not None:
        ways["as built"] = maker(loaded, task, chosen, steps)
        for whole in CURVE:
            times = tuple(timesteps[place] for place in spread(steps, whole, 1.0))
            ways[f"{whole} whole"] = maker(loaded, task, StepCache(chosen.engine, times, 1.0), steps)
    for fewer in FEWER:
        ways[f"{fewer} steps"] = maker(loaded, task, None, fewer)
    return ways


def quality(make: Maker, rows: Sequence[Trajectory]) -> dict[str, float]:
    """Of the pictures of some rows against the float original's."""
    similar, noise = [], []
    for one in rows:
        want, have = (np.asarray(picture, np.float32) / 255 for picture in (one.picture, make(one).image))
        if (value := ssim(want, have)) is not None:
            similar.append(value)
        noise.append(psnr_db(want, have, peak=1.0))
    return {"ssim": fmean(similar), "least ssim": min(similar), "psnr_db": fmean(noise)}


def curve(folder: Path, wanted: Mapping[str, Reference], rounds: int) -> dict[str, Any]:
    """By task and way, quality and time."""
    found: dict[str, Any] = {}
    with runtime.load(folder, verify=False) as loaded:
        for task, reference in wanted.items():
            rows, ways = reference.trajectories, makers(loaded, task, reference.trajectories[0].timesteps)
            good = {name: quality(make, rows) for name, make in ways.items()}
            times = timing.interleave({name: partial(make, rows[0]) for name, make in ways.items()}, rounds)
            cache, record = loaded.manifest.tasks[task].step_cache, loaded.manifest.tasks[task].provenance.step_cache
            found[task] = {
                "whole": None if cache is None else len(cache.whole_at),
                "slope": None if cache is None else cache.slope,
                "shallow share of operations": None if record is None else record.shallow_share,
                "ways": {
                    name: {**good[name], "seconds": times[name].median, "ratio": times[name].ratio} for name in ways
                },
            }
            print(task, json.dumps(found[task]["ways"]), flush=True)
    return found


def resident(folder: Path) -> dict[str, float]:
    """Megabytes of a process that has made a picture of each task: with whole steps alone, and with shallow ones."""
    return {name: _resident(folder, cached) for name, cached in (("all whole", False), ("with shallow steps", True))}


def _resident(folder: Path, cached: bool) -> float:
    command = [sys.executable, "-m", "bench.step_cache", "resident", "--bundle", str(folder)]
    done = subprocess.run([*command, *(["--cached"] if cached else [])], capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_resident(folder: Path, cached: bool) -> None:
    """Make a picture of each task, and print the proportional set size, megabytes."""
    from PIL import Image

    with runtime.load(folder, verify=False) as loaded:
        height, width = loaded.manifest.image_size
        given = {"image": Image.new("RGB", (width, height), "white"), "mask": Image.new("L", (width, height), 255)}
        for task in loaded.tasks:
            fills = {"image": "image", "masked_image": "image", "mask": "mask"}
            needed = {fills[one] for one in task.condition}
            loaded.run(task.name, "a red apple", step_cache=cached, **{name: given[name] for name in needed})
        lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
        print(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1e3)


def rows_of(found: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for task, one in found.items():
        for name, way in one["ways"].items():
            label = f"**as built: {one['whole']} whole, slope {one['slope']:g}**" if name == "as built" else name
            rows.append(
                [
                    task,
                    label,
                    f"{way['ssim']:.4f}",
                    f"{way['least ssim']:.3f}",
                    f"{way['psnr_db']:.1f}",
                    f"{way['seconds'] * 1e3:.0f}",
                    f"{1 / way['ratio']:.2f} ×",
                ]
            )
    return rows


def draw(found: Mapping[str, Any]) -> None:
    """Speed against SSIM, a panel a task: the step cache's curve, what was built, and fewer steps of the sampler."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (task, one) in zip(np.atleast_1d(panels), found.items(), strict=True):
        ways = one["ways"]

        def line(names: Sequence[str], ways: Mapping[str, Any] = ways) -> tuple[list[float], list[float]]:
            known = sorted((1 / ways[name]["ratio"], ways[name]["ssim"]) for name in names if name in ways)
            return [speed for speed, _ in known], [similar for _, similar in known]

        axes.axhline(0.97, color="#999999", linewidth=0.8, linestyle=":")
        axes.axvline(1.6, color="#999999", linewidth=0.8, linestyle=":")
        axes.plot(
            *line(["all whole", *(f"{n} whole" for n in CURVE)]), "o-", color="#0b6e99", ms=4, label="step cache, even"
        )
        axes.plot(*line([f"{n} steps" for n in FEWER]), "s--", color="#b35c00", ms=4, label="fewer sampler steps")
        axes.plot(*line(["as built"]), "*", color="#a0146e", ms=12, label="as built")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("pictures, times as fast", fontsize=9)
        axes.tick_params(labelsize=8)
    first = np.atleast_1d(panels)[0]
    first.set_ylabel("SSIM to the float original", fontsize=9)
    first.set_ylim(0.88, 1.003)
    first.legend(fontsize=7.5, loc="lower left", frameon=False)
    figure.savefig(FIGURE, metadata={"Date": None})


def sd15(rounds: int, *, int8: bool) -> None:
    """Whole and shallow step of text-to-image at Stable Diffusion 1.5's size, batch 2."""
    from bench import unet
    from targets.costs.roofline import multiply_adds

    wanted = ["dynamic", "static", *(["nncf", "int8"] if int8 else [])]
    plain, multi, size, length = unet.sd15_models()
    graphs, _ = unet.build_graphs(plain, multi, size, length, Path("build/bench/graphs/sd15"), wanted)
    feed = unet.inputs(plain, size, length, channels=4)
    feed["deep_feature"] = np.random.default_rng(0).standard_normal((unet.BATCH, 320, size, size)).astype(np.float32)
    del plain, multi
    candidates: dict[str, Callable[[], object]] = {}
    shares = {}
    kinds = [("bf16", "static"), *([("INT8, rest bf16", "int8")] if int8 else [])]
    for name, source in kinds:
        counts = []
        for part, ids in (("whole", "mtu::emit-deep-feature"), ("shallow", "mtu::take-deep-feature")):
            path = graphs[source].with_name(f"{part}.onnx")
            if not path.exists():
                passes.run_pipeline(graphs[source], path, (ids,), PassContext())
            counts.append(sum(multiply_adds(graph_io.load(path))))
            candidates[f"{name}, {part}"] = timing.openvino_runner(path, "bf16", feed)
        shares[name] = counts[1] / counts[0]
    timing.write(
        "step-cache-sd15",
        {"rounds": rounds, "shallow share of operations": shares, "steps": timing.interleave(candidates, rounds)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["curve", "sd15", "resident"])
    parser.add_argument("--bundle", type=Path, default=WORK / "bundle")
    parser.add_argument("--pictures", type=int, default=24, help="held-out rows a task")
    parser.add_argument("--rounds", type=int, default=12, help="of timing")
    parser.add_argument("--float-only", action="store_true", help="with sd15: no INT8, which takes long to make")
    parser.add_argument("--cached", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "resident":
        print_resident(args.bundle, args.cached)
        return
    if args.what == "sd15":
        sd15(args.rounds, int8=not args.float_only)
        return
    if not args.bundle.exists():
        build(BuildOptions(held_out.MODEL, args.bundle, gate="off", mixed=False, step_cache="auto"))
    found = curve(args.bundle, held_out.references(args.pictures), args.rounds)
    timing.write("step-cache", {"pictures": args.pictures, "tasks": found, "MB": resident(args.bundle)})
    heads = ["task", "steps (of 20)", "SSIM", "least", "PSNR dB", "picture ms", "speed"]
    held_out.into_docs(PAGE, "step-cache", held_out.markdown(heads, rows_of(found)))
    draw(found)


if __name__ == "__main__":
    main()
