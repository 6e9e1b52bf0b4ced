"""What each target costs to build: time, peak memory, bytes, and the toolchain's own latency estimate.

    python -m bench.targets example       every task of the emoji example, 16×16 latents
    python -m bench.targets sd15          one task of Stable Diffusion 1.5's size, random weights, 32×32 latents

The graphs are exported and quantised once; then each target lowers and builds them, one process each, so that a figure
is one build's own. Peak memory is the largest process: the NPU compiler runs in a child.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import timing
from mtu_compile.core.atomic import staging

WORK = Path("build/bench")
#: (target, precision), in the order they are built.
BUILDS = (
    ("cpu", "int8"),
    ("jetson-orin", "fp16"),
    ("jetson-orin", "int8"),
    ("rtx-ada", "fp16"),
    ("rtx-ada", "int8"),
    ("rtx-ada", "fp8"),
    ("intel-npu", "fp16"),
    ("intel-npu", "int8"),
)


def graphs(which: str, folder: Path) -> None:
    """Write ``TASK/model.onnx`` (static, float32) and ``TASK/int8.onnx`` for each task."""
    from bench.families import FAMILIES
    from bench.make_pipeline import write_pipeline
    from calibration.capture import capture
    from calibration.fp8 import to_fp8
    from calibration.quantize import quantize_onnx
    from calibration.samples import load_samples
    from mtu_compile.core.hashing import model_sha256
    from mtu_compile.model.export import export_unet
    from mtu_compile.model.pipeline import MTUPipeline
    from mtu_compile.stages.precision import INT8
    from passes import specialise

    model, size, steps = Path("examples/emoji/model"), (64, 64), 20
    if which == "sd15":
        model, size, steps = WORK / "sd15-model", (256, 256), 4
        if not (model / "model_index.json").exists():
            write_pipeline(FAMILIES["sd15"], model)
    pipeline, sha = MTUPipeline.from_pretrained(model), model_sha256(model)
    tasks = pipeline.unet.tasks if which == "example" else pipeline.unet.tasks[:1]
    length, channels = int(pipeline.tokenizer.model_max_length), pipeline.unet.latent_channels
    dynamic = export_unet(pipeline.unet, folder / "dynamic", text_length=length)
    sets = {}
    for index, task in enumerate(tasks):
        specialise(
            dynamic,
            folder / task.name / "model.onnx",
            task_id=index,
            channels=channels + task.condition_channels(channels),
            batch=task.unet_batch,
            height=size[0] // pipeline.vae_scale,
            width=size[1] // pipeline.vae_scale,
            text_length=length,
        )
        rows = [row for row in load_samples(model / "samples", task) if row.split != "check"][: 4 if steps > 4 else 1]
        sets[task.name] = capture(pipeline, task, rows, model_sha256=sha, steps=steps, size=size, seed=0)
    del pipeline
    shutil.rmtree(folder / "dynamic")
    for name, one in sets.items():
        quantize_onnx(folder / name / "model.onnx", one, folder / name / "int8.onnx", settings=INT8)
        to_fp8(folder / name / "int8.onnx", folder / name / "model.onnx", folder / name / "fp8.onnx")


def build_one(target_name: str, precision: str, graph: Path, out: Path) -> dict[str, object]:
    """Lower and build one graph; runs in a process of its own."""
    import passes
    import targets
    from mtu_compile.bundle.engine import describe_state

    target = targets.get(target_name)
    ids = target.spec.lowering.get(precision, ())  # type: ignore[call-overload]
    lowered = graph
    began = time.perf_counter()
    if ids:
        lowered = out.parent / f"{out.name}.lowered" / "model.onnx"
        lowered.parent.mkdir(parents=True)
        passes.run_pipeline(graph, lowered, ids, passes.PassContext())
    lowering = time.perf_counter() - began
    began = time.perf_counter()
    artifact = target.build(lowered, out, precision=precision)  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    made = artifact.prebuilt
    return {
        "lower s": round(lowering, 1),
        "build s": round(seconds, 1),
        "peak GB": round(peak / 1e6, 2),
        "graph MB": round(sum(p.stat().st_size for p in artifact.files if p != made) / 1e6, 1),
        "engine MB": None if made is None else round(made.stat().st_size / 1e6, 1),
        "estimate ms": None if artifact.estimate is None else artifact.estimate.latency_ms,
        "state": describe_state(artifact.state, artifact.reason),
        "toolchain": artifact.toolchain,
    }


def run(which: str, builds: Sequence[tuple[str, str]]) -> None:
    folder = WORK / f"graphs-{which}"
    if not folder.exists():
        # A process of its own: what it needs is not a build's.
        subprocess.run([sys.executable, "-m", "bench.targets", which, "--graphs-only"], check=True)
    results: dict[str, object] = {}
    for target, precision in builds:
        for task in sorted(path.name for path in folder.iterdir()):
            graph = folder / task / {"int8": "int8.onnx", "fp8": "fp8.onnx"}.get(precision, "model.onnx")
            out = WORK / "targets" / task
            shutil.rmtree(out.parent, ignore_errors=True)
            arguments = [target, precision, str(graph), str(out)]
            done = subprocess.run([sys.executable, "-m", "bench.targets", "one", *arguments], capture_output=True)
            if done.returncode:
                results[f"{target} {precision} {task}"] = done.stderr.decode().strip().splitlines()[-1]
            else:
                results[f"{target} {precision} {task}"] = json.loads(done.stdout.decode().splitlines()[-1])
            print(target, precision, task, results[f"{target} {precision} {task}"], file=sys.stderr)
    timing.write(f"targets-{which}", results)


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        target, precision, graph, out = sys.argv[2:]
        print(json.dumps(build_one(target, precision, Path(graph), Path(out))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["example", "sd15"])
    parser.add_argument("--only", action="append", metavar="TARGET:PRECISION", help="build only this; may be repeated")
    parser.add_argument("--graphs-only", action="store_true", help="export and quantise, build nothing")
    args = parser.parse_args()
    if args.graphs_only:
        with staging(WORK / f"graphs-{args.which}", replace=False) as folder:
            graphs(args.which, folder)
        return
    chosen = [tuple(one.split(":", 1)) for one in args.only or ()]
    run(args.which, chosen or BUILDS)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
