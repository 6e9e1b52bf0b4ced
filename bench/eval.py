"""INT8 against float on the held-out emoji: what is built, all of it in INT8, and bf16; accuracy and time of a step.

    python -m bench.eval                    (make eval; half an hour on two cores the first time)
    python -m bench.eval --pictures 8
    python -m bench.eval --part accuracy    (on a machine that is busy: no step times)
    python -m bench.eval --part times       (step times of the same bundles, when it is quiet)

Everything starts from the same noise and takes the same steps; the float side is the dynamically routed original in
float32. No row, prompt or seed was used for calibration. Step times are interleaved, so their ratios hold on a machine
that drifts. Writes ``build/bench/eval.json``, ``build/bench/thresholds.json`` and the table in ``docs/accuracy.md``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bench import held_out, timing
from mtu_compile import runtime
from mtu_compile.accuracy.threshold_file import suggest
from mtu_compile.accuracy.verdict import TaskCheck
from mtu_compile.compile import BuildOptions, build
from mtu_compile.runtime.reference import Reference

WORK = Path("build/bench/eval")
#: What is the same for several builds is made once.
CACHE = Path("build/bench/cache")
PAGE = Path("docs/accuracy.md")

#: With every layer in INT8; thresholds that the example could have are suggested by what it measures.
ALL_INT8 = "INT8, all layers"
THRESHOLDS = Path("build/bench/thresholds.json")

#: What is compared: name → options of the build. The first is what users get.
BUILDS: Mapping[str, Mapping[str, Any]] = {
    "INT8, mixed (as built)": {"precision": "int8"},
    ALL_INT8: {"precision": "int8", "mixed": False},
    "bf16": {"precision": "bf16"},
}


def built(name: str, options: Mapping[str, Any]) -> Path:
    """The bundle of one row; one that is there already is kept."""
    folder = WORK / "".join(c if c.isalnum() else "-" for c in name)
    if not folder.exists():
        print(f"building {folder}", flush=True)
        build(BuildOptions(model=held_out.MODEL, output=folder, gate="off", cache=CACHE, **options))
    return folder


def step_times(folders: Mapping[str, Path], wanted: Mapping[str, Reference], rounds: int) -> dict[str, Any]:
    """By task, seconds of one UNet step of each build; ratios to the build with all layers in INT8."""
    times = {}
    order = sorted(folders, key=lambda name: name != ALL_INT8)
    for task, reference in wanted.items():
        runners: dict[str, Callable[[], object]] = {}
        for name in order:
            unet = runtime.load(folders[name], verify=False).unet(task)
            runners[name] = partial(unet, reference.trajectories[0].inputs[0])
        times[task] = timing.interleave(runners, rounds)
    return times


def known_times(results: Mapping[str, Any]) -> dict[str, dict[str, timing.Timing]]:
    """By task and build, what an earlier run timed."""
    return {
        task: {name: timing.Timing(**one) for name, one in found.items()}
        for task, found in results.get("step seconds", {}).items()
    }


def figures(check: TaskCheck) -> dict[str, Any]:
    """What is kept of one task of one build."""
    summary = check.summary()
    keys = ("pictures", "worst_sqnr_db", "mean_sqnr_db", "guidance_ratio", "guidance", "latent_psnr_db")
    more = ("image_psnr_db", "ssim", "vif", "colour_difference", "inside_psnr_db", "outside_psnr_db", "truth", "region")
    least = min(value for one in check.metrics.pictures if (value := one.values["ssim"]) is not None)
    return {**{key: summary[key] for key in (*keys, *more)}, "least_ssim": least}


def row(task: str, name: str, one: Mapping[str, Any], time: timing.Timing | None) -> list[str]:
    ratios = [f"{delta['ratio']:.3f}" for delta in (one["guidance"] or {}).values()]
    calls = "-" if one["guidance_ratio"] is None else "{:.3f}-{:.3f}".format(*one["guidance_ratio"])
    decibels = f"{one['worst_sqnr_db']:.1f} / {one['mean_sqnr_db']:.1f}"
    region = [one[key] for key in ("inside_psnr_db", "outside_psnr_db")]
    regions = "-" if None in region else " / ".join(f"{value:.1f}" for value in region)
    pictures = [f"{one['ssim']:.4f}", f"{one['least_ssim']:.3f}", f"{one['vif']:.3f}", f"{one['image_psnr_db']:.1f}"]
    speed = ("-", "-") if time is None else (f"{time.median * 1e3:.2f}", f"{1 / time.ratio:.3f}")
    return [task, name, *pictures, regions, decibels, ", ".join(ratios) or "-", calls, *speed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=40, help="held-out rows a task")
    parser.add_argument("--rounds", type=int, default=100, help="of timing")
    parser.add_argument(
        "--part", choices=["both", "accuracy", "times"], default="both", help="the other stays as it is"
    )
    args = parser.parse_args()
    folders = {name: built(name, options) for name, options in BUILDS.items()}
    wanted = held_out.references(args.pictures)
    known = timing.read(timing.RESULTS / "eval.json")
    times, checks = known_times(known), known.get("checks", {})
    if args.part != "accuracy":
        times = step_times(folders, wanted, args.rounds)
    if args.part != "times":
        for name, folder in folders.items():
            print(f"checking {name}", flush=True)
            found = held_out.check(folder, wanted)
            checks[name] = {task: figures(one) for task, one in found.items()}
            if name == ALL_INT8:
                THRESHOLDS.write_text(json.dumps(suggest(found, "int8"), indent=2) + "\n")
    columns = ["task", "build", "SSIM", "least", "VIF", "PSNR dB", "inside / outside", "UNet SQNR dB worst / mean"]
    columns += ["guidance ratio", "of single calls", "step ms", "speed"]
    rows = [row(task, name, checks[name][task], times.get(task, {}).get(name)) for task in wanted for name in BUILDS]
    timing.write("eval", {"pictures": args.pictures, "checks": checks, "step seconds": times})
    held_out.into_docs(PAGE, "eval", held_out.markdown(columns, rows))


if __name__ == "__main__":
    main()
