"""What half precision, INT8 and FP8 cost in accuracy, operator class by operator class, and in kernels.

    python -m bench.precision                   the emoji example's text-to-image UNet
    python -m bench.precision --task edit --skip-classes

Figures are SQNR in decibels of the UNet's output against the float original on its own denoising trajectories, noise
and signal pooled over the calls. Half precision is simulated: every result of a half operator is rounded, and computed
in float32 inside (``passes.simulate_half``). Kernels are those in the engine TensorRT-RTX builds for SM89 without a
GPU: it carries their source. How fast they run is not known here.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import passes
from bench import timing
from calibration.capture import capture
from calibration.fp8 import GEMMS, to_fp8
from calibration.quantize import quantize_onnx
from calibration.record import record_reference
from calibration.samples import load_samples
from mtu_compile.accuracy.formulas import sqnr_db
from mtu_compile.core.tasks import find_task
from mtu_compile.graph import io as graph_io
from mtu_compile.graph.sessions import open_as_written
from mtu_compile.model import export
from mtu_compile.runtime.reference import Reference
from mtu_compile.stages.precision import INT8
from passes.keep_float import KEEP, Rule, angles, first_layer, last_layer, of_type
from passes.simulate_half import simulate_half
from passes.to_half import ToHalf

MODEL = Path("examples/emoji/model")
HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
LOWERED = ("mtu::legalise-qdq",)


def named(op_types: str, pattern: str) -> Rule:
    """Nodes of some operators (space-separated) whose module's name ends in a pattern."""

    def find(graph: ir.Model) -> set[ir.Node]:
        nodes = of_type(*op_types.split())(graph)
        return {node for node in nodes if re.search(f"(?:{pattern})$", (node.name or "").rpartition("/")[0])}

    return find


def scores(graph: ir.Model) -> set[ir.Node]:
    """Products of two activations."""
    return {n for n in graph.graph if n.op_type == "MatMul" and not any(v.is_initializer() for v in n.inputs if v)}


CLASSES: Mapping[str, Rule] = {
    "angles": angles,
    "first convolution": first_layer,
    "last convolution": last_layer,
    "time embedding's layers": named("Gemm", ".*"),
    "norms": of_type("InstanceNormalization", "LayerNormalization"),
    "affine of group norms": named("Mul Add", r"norm\d?|conv_norm_out"),
    "softmax": of_type("Softmax"),
    "attention products": scores,
    "linear layers": lambda graph: of_type("MatMul")(graph) - scores(graph),
    "convolutions": of_type("Conv"),
    "gelu": of_type("Gelu"),
    "silu": lambda graph: of_type("Sigmoid")(graph) | named("Mul", "nonlinearity|act|conv_act")(graph),
    "residual additions": named("Add", r"resnets\.\d|attentions\.\d|transformer_blocks\.\d"),
}


def prepare(task_name: str, work: Path, steps: int, pictures: int) -> tuple[Path, Path, Reference]:
    """Static float graph, INT8 graph and float reference of one task; what is there already is kept."""
    from mtu_compile.model.pipeline import MTUPipeline

    work.mkdir(parents=True, exist_ok=True)
    graph, int8, reference = work / "float.onnx", work / "int8.onnx", work / "reference.safetensors"
    if not (int8.exists() and reference.exists()):
        pipeline = MTUPipeline.from_pretrained(MODEL)
        task_id, task = find_task(pipeline.unet.tasks, task_name)
        size = pipeline.resolve_size(None, None)
        length, channels = int(pipeline.tokenizer.model_max_length), pipeline.unet.latent_channels
        passes.specialise(
            export.export_unet(pipeline.unet, work / "dynamic", text_length=length),
            graph,
            task_id=task_id,
            channels=channels + task.condition_channels(channels),
            batch=task.unet_batch,
            height=size[0] // pipeline.vae_scale,
            width=size[1] // pipeline.vae_scale,
            text_length=length,
        )
        rows = load_samples(MODEL / "samples", task)
        checking = tuple(row for row in rows if row.split == "check") or rows[3::4]
        calibrating = tuple(row for row in rows if row not in checking)[:12]
        captured = capture(pipeline, task, calibrating, model_sha256="", steps=steps, size=size)
        quantize_onnx(graph, captured, int8, settings=INT8)
        record_reference(pipeline, task, checking[:pictures], size=size, steps=steps, producer="bench").save(reference)
    return graph, int8, Reference.load(reference)


class Scale:
    """Weighs graphs on the recorded calls."""

    def __init__(self, reference: Reference, every: int) -> None:
        self.calls = [
            (call, trajectory.outputs[i], timestep)
            for trajectory in reference.trajectories
            for i, (call, timestep) in enumerate(zip(trajectory.inputs, trajectory.timesteps, strict=True))
            if i % every == 0
        ]

    def of(self, run: Any) -> dict[str, float]:
        """Decibels over all calls, and of the first and the last timestep on its own."""
        noise = [(t, 10 ** (-sqnr_db(want, run(call)) / 10)) for call, want, t in self.calls]

        def pooled(values: Iterable[float]) -> float:
            return round(float(-10 * np.log10(np.mean(list(values)))), 2)

        timesteps = sorted({t for t, _ in noise})
        ends = {f"t={end:.0f}": pooled(n for t, n in noise if t == end) for end in (timesteps[0], timesteps[-1])}
        return {"all": pooled(n for _, n in noise), **ends}

    def onnx(self, graph: ir.Model) -> dict[str, float]:
        """By ONNX Runtime without its optimisations; half precision is simulated."""
        simulate_half(graph)
        with tempfile.TemporaryDirectory() as folder:
            path = graph_io.save(graph, Path(folder) / "model.onnx")
            session = open_as_written(path)
            return self.of(lambda call: session.run(None, dict(call))[0])

    def openvino(self, path: Path, hint: str) -> dict[str, float]:
        import openvino

        from targets.openvino.ir import keep_angles_precise, read_graph

        graph = read_graph(path)
        keep_angles_precise(graph)
        compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        return self.of(lambda call: compiled(dict(call))[0])


def lower(path: Path, ids: tuple[str, ...], half: str | None = None, keep: Mapping[str, Rule] = KEEP) -> ir.Model:
    graph = graph_io.load(path)
    items: list[passes.Pass] = list(passes.builtin().pipeline(ids))
    if half is not None:
        items.append(ToHalf(f"mtu::to-{half}", HALF[half], keep))
    passes.run_passes(graph, items, passes.PassContext())
    return graph


def kernels(graph: ir.Model) -> dict[str, int] | str:
    """Kernels in TensorRT-RTX's engine of a graph, and how many of them are fused attention."""
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return "tensorrt_rtx is not installed"
    from targets.nvidia.builder import Recipe, build_engine

    with tempfile.TemporaryDirectory() as folder:
        path = graph_io.save(graph, Path(folder) / "model.onnx")
        recipe = Recipe(compute_capabilities=("8.9",))
        engine = build_engine(path, Path(folder) / "engine", recipe, kind="tensorrt-rtx").path.read_bytes()
    names = re.findall(rb"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+?)_0x[0-9a-f]+\(", engine)
    return {"kernels": len(names), "fused attention": sum(b"mha" in name for name in names)}


def classes(scale: Scale, graph: Path, half: str) -> dict[str, Any]:
    """For each class: the UNet with only it in half precision, and with only it kept in float32."""
    rows: dict[str, Any] = {
        "everything in half": scale.onnx(lower(graph, (), half, {})),
        "the pass": scale.onnx(lower(graph, (), half)),
    }
    for name, rule in CLASSES.items():

        def others(found: ir.Model, rule: Rule = rule) -> set[ir.Node]:
            return set(found.graph) - rule(found)

        kept = lower(graph, (), half, {name: rule})
        rows[name] = {
            "nodes": len(rule(graph_io.load(graph))),
            "casts when kept": sum(node.op_type == "Cast" for node in kept.graph),
            "only it in half": scale.onnx(lower(graph, (), half, {"others": others})),
            "only it kept": scale.onnx(kept),
        }
    return rows


def keep_lists(graph: Path) -> dict[str, Any]:
    """Kernels of the float16 engine as more and more is kept."""
    groups: dict[str, Mapping[str, Rule]] = {
        "nothing": {},
        "the pass": KEEP,
        "and group norms": {**KEEP, "more": of_type("InstanceNormalization")},
        "and layer norms": {**KEEP, "more": of_type("LayerNormalization")},
        "and softmax": {**KEEP, "more": of_type("Softmax")},
        "and silu": {**KEEP, "more": CLASSES["silu"]},
    }
    return {name: kernels(lower(graph, (), "fp16", keep)) for name, keep in groups.items()}


def precisions(scale: Scale, graph: Path, int8: Path, work: Path) -> dict[str, Any]:
    """Every precision a target is built in."""
    rows: dict[str, Any] = {"float32": {"dB": scale.onnx(graph_io.load(graph))}}

    def add(name: str, path: Path, ids: tuple[str, ...], half: str | None) -> None:
        counted = None if half is None else kernels(lower(path, ids, half))
        rows[name] = {"dB": scale.onnx(lower(path, ids, half)), "engine": counted}

    for half in HALF:
        add(half, graph, (), half)
    for ids, label in (((), "INT8 as NNCF leaves it"), (LOWERED, "INT8, legalised")):
        for half in (None, *HALF):
            add(f"{label}, rest {half or 'f32'}", int8, ids, half)
    for layers, label in ((GEMMS, "FP8 GEMMs"), ((*GEMMS, "Conv"), "FP8 GEMMs and convolutions")):
        path = work / f"fp8-{len(layers)}.onnx"
        to_fp8(int8, graph, path, layers=layers)
        add(f"{label}, rest fp16", path, LOWERED, "fp16")
    return rows


def openvino_rows(scale: Scale, graph: Path, int8: Path, work: Path) -> dict[str, Any]:
    """INT8 beside float32 and bfloat16 on OpenVINO's CPU, as NNCF leaves it and legalised."""
    legal = graph_io.save(lower(int8, LOWERED), work / "int8-legal.onnx")
    paths = {"float": graph, "INT8 as NNCF leaves it": int8, "INT8, legalised": legal}
    rows = {f"{n}, rest {hint}": scale.openvino(p, hint) for n, p in paths.items() for hint in ("f32", "bf16")}
    call = scale.calls[0][0]
    int8s = list(paths.items())[1:]
    runs = {f"{n}, rest {h}": timing.openvino_runner(path, h, call) for n, path in int8s for h in ("f32", "bf16")}
    return {"dB": rows, "seconds a step": timing.interleave(runs, rounds=60)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="t2i")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--every", type=int, default=3, help="weigh every n-th denoising step")
    parser.add_argument("--skip-classes", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("build/bench/precision"))
    args = parser.parse_args()
    work = args.work / args.task
    graph, int8, reference = prepare(args.task, work, args.steps, args.pictures)
    scale = Scale(reference, args.every)
    results: dict[str, object] = {
        "what": "SQNR of the UNet output in dB, half precision simulated; kernels: TensorRT-RTX, SM89, built, not run",
        "calls": len(scale.calls),
        "precisions": precisions(scale, graph, int8, work),
        "OpenVINO CPU": openvino_rows(scale, graph, int8, work),
    }
    if not args.skip_classes:
        results["kernels of keep lists"] = keep_lists(graph)
        results["classes"] = {half: classes(scale, graph, half) for half in HALF}
    timing.write(f"precision-{args.task}", results)


if __name__ == "__main__":
    main()
