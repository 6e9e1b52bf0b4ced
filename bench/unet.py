"""One UNet step: plain, dynamic and static graphs, and their precisions, side by side.

    python -m bench.unet example          the emoji model, 16×16 latents
    python -m bench.unet sd15             Stable Diffusion 1.5's size, random weights, 32×32 latents (12 GB of memory)

The plain graph is the pretrained UNet exported and frozen the same way. Every candidate gets the same text-to-image
batch of two. INT8 of random weights is calibrated on random inputs: good for a time, not for an accuracy.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

import passes
import targets
from bench import timing
from calibration.quantize import quantize_onnx
from mtu_compile.core.tasks import PAPER_TASKS
from mtu_compile.model import export
from mtu_compile.stages.precision import INT8

BATCH = 2


def example_models() -> tuple[Any, Any, int, int]:
    """(plain UNet, multi-task UNet, latent size, tokens) of the emoji example; the plain one has the same shape."""
    from diffusers import UNet2DConditionModel

    from mtu_compile.model.pipeline import MTUPipeline
    from mtu_compile.model.unet_config import MTU_KEYS

    pipeline = MTUPipeline.from_pretrained("examples/emoji/model")
    config = {k: v for k, v in pipeline.unet.config.items() if k not in MTU_KEYS and not k.startswith("_")}
    plain = UNet2DConditionModel(**config).eval()
    return plain, pipeline.unet.eval(), int(plain.config.sample_size), int(pipeline.tokenizer.model_max_length)


def sd15_models() -> tuple[Any, Any, int, int]:
    """The same of Stable Diffusion 1.5's configuration with random weights."""
    import torch
    from diffusers import UNet2DConditionModel

    from mtu_compile.model.upcycle import upcycle_unet

    torch.manual_seed(0)
    plain = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    return plain, tell_tasks_apart(upcycle_unet(plain, PAPER_TASKS).eval()), 32, 77


def tell_tasks_apart(unet: Any, seed: int = 1) -> Any:
    """Change ``unet`` as training does: fresh from upcycling its tasks are all alike.

    Tables whose rows are equal become constants, and what is measured of a shared engine would have no routing in it.
    """
    import torch

    from mtu_compile.model.experts import Router, TaskNorm

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in unet.modules():
            changed = [module.weight, module.bias] if isinstance(module, TaskNorm) else []
            changed += [module.fc2.weight] if isinstance(module, Router) else []
            for parameter in changed:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return unet


def inputs(plain: Any, size: int, length: int, channels: int, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    sample = np.zeros((BATCH, channels, size, size), np.float32)
    sample[:, :4] = rng.standard_normal((BATCH, 4, size, size))
    width = plain.config.cross_attention_dim
    return {
        "sample": sample,
        "timestep": np.array([500], np.float32),
        "encoder_hidden_states": rng.standard_normal((BATCH, length, width)).astype(np.float32),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["example", "sd15"])
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--work", type=Path, default=Path("build/bench/graphs"))
    args = parser.parse_args()
    work = args.work / args.which
    rounds = args.rounds or (60 if args.which == "example" else 8)

    plain, multi, size, length = example_models() if args.which == "example" else sd15_models()
    graphs, seconds = build_graphs(plain, multi, size, length, work)
    narrow = inputs(plain, size, length, channels=4)
    wide = inputs(plain, size, length, channels=multi.sample_channels)
    of_task = {
        "dynamic": {**wide, "task_ids": np.zeros(BATCH, np.int64)},
        "shared": {**wide, "task": np.zeros(BATCH, np.int64)},
    }
    del plain, multi

    def candidates(rows: dict[str, tuple[Path, str]]) -> dict[str, Any]:
        return {
            name: timing.openvino_runner(path, precision, of_task.get(path.parent.name, narrow))
            for name, (path, precision) in rows.items()
        }

    routing = {
        "plain fp32": (graphs["plain"], "f32"),
        "static fp32": (graphs["static"], "f32"),
        "shared fp32": (graphs["shared"], "f32"),
        "dynamic fp32": (graphs["dynamic"], "f32"),
    }
    precisions = {
        "static bf16": (graphs["static"], "bf16"),
        "static int8, rest bf16 (what is built)": (graphs["int8"], "bf16"),
        "static int8, rest f32": (graphs["int8"], "f32"),
        "static int8 as NNCF leaves it, rest f32": (graphs["nncf"], "f32"),
        "static fp32": (graphs["static"], "f32"),
    }
    timing.write(
        f"unet-{args.which}",
        {
            "what": f"seconds of one UNet step, batch {BATCH}, {size}x{size} latents; ratios to the first row",
            "rounds": rounds,
            "routing": timing.interleave(candidates(routing), rounds),
            "precision": timing.interleave(candidates(precisions), rounds),
            "build seconds": seconds,
            "peak GB of this process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
        },
    )


def build_graphs(
    plain: Any, multi: Any, size: int, length: int, work: Path, wanted: Collection[str] | None = None
) -> tuple[dict[str, Path], dict[str, float]]:
    """Graphs by name, and how long each took; graphs that are there already are kept, and only ``wanted`` are made."""
    samples = [inputs(plain, size, length, channels=4, seed=i) for i in range(4)]
    graphs = {name: work / name / "model.onnx" for name in ("plain", "dynamic", "static", "shared", "nncf", "int8")}
    shape = {"batch": BATCH, "height": size, "width": size, "text_length": length}

    def freeze_plain() -> None:
        exported = export.export_plain_unet(plain, work / "plain-dynamic", text_length=length)
        context = passes.PassContext(task_id=0, channels=4, **shape)
        passes.run_pipeline(exported, graphs["plain"], passes.STATIC_PIPELINE, context)

    steps = {
        "plain": freeze_plain,
        "dynamic": lambda: export.export_unet(multi, work / "dynamic", text_length=length),
        "static": lambda: passes.specialise(graphs["dynamic"], graphs["static"], task_id=0, channels=4, **shape),
        "shared": lambda: passes.run_pipeline(
            graphs["dynamic"], graphs["shared"], passes.SHARED_PIPELINE, passes.PassContext(**shape)
        ),
        "nncf": lambda: quantize_onnx(graphs["static"], samples, graphs["nncf"], settings=INT8),
        "int8": lambda: passes.run_pipeline(
            graphs["nncf"], graphs["int8"], targets.get("cpu").spec.lowering["int8"], passes.PassContext()
        ),
    }
    seconds = {}
    for name, step in steps.items():
        if not graphs[name].exists() and (wanted is None or name in wanted):
            began = time.perf_counter()
            step()
            seconds[name] = round(time.perf_counter() - began, 1)
    return graphs, seconds


if __name__ == "__main__":
    main()
