"""Time and peak memory of ``mtu-compile build`` as a user runs it, in a process of its own.

python -m bench.build example     the emoji example, all tasks, INT8
python -m bench.build sd15        one task of Stable Diffusion 1.5's size: random weights, 256×256 pictures

With --no-mixed-precision, without the search for layers that stay float.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from bench import timing

WORK = Path("build/bench")


def sd15_model(folder: Path) -> Path:
    """An MTU pipeline folder whose UNet has Stable Diffusion 1.5's shape; text encoder and autoencoder are smaller."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from bench.unet import sd15_models
    from mtu_compile.model.pipeline import MTUPipeline

    tokenizer = CLIPTokenizer.from_pretrained("examples/emoji/model/tokenizer", model_max_length=77)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=768, intermediate_size=1024, num_hidden_layers=2)
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
    )
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing")
    _, unet, _, _ = sd15_models()
    MTUPipeline(unet, vae, text, tokenizer, scheduler).save_pretrained(folder)
    samples = folder / "samples" / "t2i"
    samples.mkdir(parents=True)
    rows = [{"prompt": f"picture {i}", "split": "check" if i == 3 else "calibration"} for i in range(4)]
    (samples / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["example", "sd15"])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--no-mixed-precision", action="store_true")
    args = parser.parse_args()
    out = WORK / f"bundle-{args.which}"
    options = ["--int8", "--force", "-o", str(out)]
    options += ["--no-mixed-precision"] if args.no_mixed_precision else []
    model = Path("examples/emoji/model")
    if args.which == "sd15":
        model = WORK / "sd15-model"
        if not (model / "model_index.json").exists():
            # A process of its own: what it needs is not the build's.
            subprocess.run(
                [sys.executable, "-c", f"from bench.build import *; sd15_model(Path({str(model)!r}))"], check=True
            )
        options += ["--task", "t2i", "--size", "256x256", "--steps", "4", "--check-pictures", "1"]
        options += ["--calibration-pictures", "1", "--accuracy-gate", "off"]
    seconds = []
    log = ""
    for _ in range(args.runs):
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "mtu_compile", "build", str(model), *options],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        seconds.append(round(time.perf_counter() - began, 1))
        log = done.stderr
    # The largest single child, which is the build: making the model needs less.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    stages = dict(line.rsplit(": ", 1) for line in log.splitlines() if line.endswith(" s"))
    timing.write(
        f"build-{args.which}{'-all-int8' if args.no_mixed_precision else ''}",
        {"seconds": seconds, "peak GB": round(peak, 2), "bundle bytes": size, "stages of the last run": stages},
    )


if __name__ == "__main__":
    main()
